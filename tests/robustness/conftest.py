from .adapter_folders import *  # noqa: F403
from .commands import *  # noqa: F403
from .op_calls import *  # noqa: F403
