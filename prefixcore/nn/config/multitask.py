"""The configuration of a soft prompt that several tasks share."""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import ClassVar

from .base import PEFT_INITS, BaseConfig
from .checks import check_choice, check_positive, check_prompt_tensor

SOURCE_INITS = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
"""What multitask prompt tuning can take of an earlier adapter, by PEFT's names."""


@dataclass(frozen=True, eq=False)
class MultitaskPromptTuningConfig(BaseConfig):
    """Multitask prompt tuning: one soft prompt, and a low-rank factor a task (Wang et al., arXiv:2303.02861).

    Args:
        num_virtual_tokens, init, init_text, seed, task_type, tokenizer_name_or_path, modules_to_save: as in
            `PromptTuningConfig`; `init` is that of the shared prompt.
        num_ranks: of the factors.
        num_tasks: how many tasks there are.
        prompt_tuning_init: PEFT's name of `init` ("TEXT", "SAMPLE_VOCAB", "RANDOM"); or what to begin from of an
            adapter of this kind: "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED".
        prompt_tuning_init_text: PEFT's name of `init_text`.
        prompt_tuning_init_state_dict_path: that adapter's safetensors file.
        prompt_tuning_init_task: of "EXACT_SOURCE_TASK", which task.

    Raises:
        ValueError: a value is out of range or two contradict each other.

    Examples:
        >>> from prefixcore.nn import MultitaskPromptTuningConfig
        >>> MultitaskPromptTuningConfig(num_virtual_tokens=20, num_tasks=3, prompt_tuning_init="RANDOM").init
        'random'
    """

    method: ClassVar[str] = "multitask-prompt"
    reparameterization: ClassVar[str] = "none"

    num_ranks: int = 1
    num_tasks: int = 1
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = 0
    source_init: str | None = None
    prompt_tuning_init: InitVar[str | None] = None
    prompt_tuning_init_text: InitVar[str | None] = None

    def __post_init__(self, prompt_tuning_init: str | None, prompt_tuning_init_text: str | None) -> None:
        if prompt_tuning_init in SOURCE_INITS:
            self._set(source_init=prompt_tuning_init)
        elif prompt_tuning_init is not None:
            check_choice("prompt_tuning_init", prompt_tuning_init, (*PEFT_INITS, *SOURCE_INITS))
            self._set(init=PEFT_INITS[prompt_tuning_init])
        if self.source_init is not None:
            check_choice("source_init", self.source_init, SOURCE_INITS)
            if not isinstance(self.prompt_tuning_init_state_dict_path, str):
                raise ValueError(f"prompt_tuning_init={self.source_init!r} needs prompt_tuning_init_state_dict_path")
            self._set(init="tensor")
        if prompt_tuning_init_text is not None:
            self._set(init_text=prompt_tuning_init_text)
        self._check_common()
        check_prompt_tensor(self.init)
        check_positive("num_ranks", self.num_ranks)
        check_positive("num_tasks", self.num_tasks)
        task = self.prompt_tuning_init_task
        if isinstance(task, bool) or not isinstance(task, int) or task < 0:
            raise ValueError(f"prompt_tuning_init_task must be an integer of at least 0, got {task!r}")
