"""longverse: language models that read 256K tokens, on one machine.

Importing the package registers XVERSE with transformers' Auto classes. The `longverse` command leaves that out
(LONGVERSE_COMMAND=1), since transformers' model classes take seconds to import and the engine does not need them.

    model = longverse.load("smol")
    print(model.read("report.pdf").ask("Who is the chair?").marked)
"""

import os
from typing import TYPE_CHECKING, Any

from .errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "load"]

if TYPE_CHECKING:
    from .api import load

if os.environ.get("LONGVERSE_COMMAND") != "1":
    from transformers import AutoConfig, AutoModelForCausalLM

    from .models.configuration_xverse import XverseConfig
    from .models.modeling_xverse import XverseForCausalLM

    AutoConfig.register("xverse", XverseConfig, exist_ok=True)
    AutoModelForCausalLM.register(XverseConfig, XverseForCausalLM, exist_ok=True)
    __all__ += ["XverseConfig", "XverseForCausalLM"]


def __getattr__(name: str) -> Any:
    """`longverse.load` brings the engine with it when it is first used."""
    if name == "load":
        from .api import load

        return load
    raise AttributeError(f"module 'longverse' has no attribute {name!r}")
