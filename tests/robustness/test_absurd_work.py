"""Work that would never end, or fill the memory, is refused before it begins."""

from __future__ import annotations

import json
import time


def test_absurd_work_is_refused_at_once(refused_training, refused_generation, tmp_path, data):
    began = time.perf_counter()
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "a" * 10_000_000, "completion": "b"}) + "\n" + data.read_text())
    assert "line 1: 10,000,001 characters" in refused_training("--data", long, "--eval-fraction", 0)
    assert "10,000,000 characters" in refused_training("--init-text", "a" * 10_000_000)
    assert "leave no room" in refused_training("--init-text", "a" * 200, "--num-virtual-tokens", 200)
    assert "1,000,000,000 virtual tokens" in refused_training("--num-virtual-tokens", 10**9)
    assert "100,000 characters" in refused_generation("--prompt", "a" * 100_000)
    assert time.perf_counter() - began < 60  # of which reading 10 MB as tokens would take more


def test_too_little_memory_is_one_line(refused_training):
    line = refused_training("--method", "p-tuning", "--encoder-hidden-size", 10**13)
    assert "out of memory (" in line
    assert "bytes were wanted" in line
