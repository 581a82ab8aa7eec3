"""An engine of vLLM's with the connector, in a process of its own, as a server has it."""

from __future__ import annotations

from typing import Any

from prefixcore.serving import vllm_command

from .world import World


def transfer_config(world: World, **extra: Any) -> dict[str, Any]:
    """`--kv-transfer-config`."""
    config = vllm_command.transfer_config(world.registry)
    config["kv_connector_extra_config"] |= extra
    return config


class Engine:
    """vLLM's offline engine on the tiny model.

    Args:
        world: the model and the registry.
        extra: settings of the connector.
        options: vLLM's.
    """

    def __init__(self, world: World, extra: dict[str, Any] | None = None, **options: Any) -> None:
        from vllm import LLM

        self.world = world
        self.llm = LLM(
            model=str(world.folder),
            kv_transfer_config=transfer_config(world, **(extra or {})),
            **{"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 512, **options},
        )

    def run(self, requests: list[dict[str, Any]], tokens: int = 16, **sampling: Any) -> list[Any]:
        """The outputs of one batch; `sampling`: arguments of `SamplingParams`, a list: one for each request."""
        from vllm import SamplingParams

        def params(i: int) -> Any:
            own = {name: value[i] if isinstance(value, list) else value for name, value in sampling.items()}
            return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **own)

        return self.llm.generate(requests, [params(i) for i in range(len(requests))], use_tqdm=False)

    def tokens(self, requests: list[dict[str, Any]], tokens: int = 16) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in self.run(requests, tokens)]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
