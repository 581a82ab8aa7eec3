"""What a front in vLLM's server serves: what the connector in the same server was told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .asgi import Scope
from .catalog import Catalog
from .openai_errors import Refusal
from .settings import Settings


@dataclass(frozen=True)
class FrontSettings:
    """The front's settings.

    Attributes:
        adapters: what is served.
        placeholder: the token id that stands for a virtual token.
    """

    adapters: Catalog
    placeholder: int


def connector_settings(scope: Scope) -> FrontSettings:
    """The settings of the connector in the server that a request has come to.

    Raises:
        Refusal: it is not vLLM's server, or it has no connector of ours.
    """
    config: Any = getattr(getattr(scope.get("app"), "state", None), "vllm_config", None)
    transfer: Any = getattr(config, "kv_transfer_config", None)
    if getattr(transfer, "kv_connector", None) != "PrefixConnector":
        raise Refusal(
            "prefixcore's front is a middleware of a vLLM server with prefixcore's connector, which this server "
            "has not: start it with prefixcore serve, or give --kv-transfer-config as docs/guides/serving.md says",
            status=500,
            code="no_connector",
        )
    from .engine import checkpoint_folder, model_layers
    from .served_model import ServedModel

    settings = Settings.parse(transfer.kv_connector_extra_config)
    model = config.model_config
    served = ServedModel.describe(model.hf_config, model_layers(model), checkpoint_folder(config))
    return FrontSettings(Catalog(settings.adapters, served, settings.baked), settings.placeholder)
