from .commands import *  # noqa: F403
from .op_calls import backend  # noqa: F401
