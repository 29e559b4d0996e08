"""longverse: language models that read 256K tokens, on one machine.

Importing the package registers XVERSE with transformers' Auto classes. The `longverse` command leaves that out
(LONGVERSE_COMMAND=1), since transformers' model classes take seconds to import and the engine does not need them.
"""

import os

from .errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "__version__"]

if os.environ.get("LONGVERSE_COMMAND") != "1":
    from transformers import AutoConfig, AutoModelForCausalLM

    from .models.configuration_xverse import XverseConfig
    from .models.modeling_xverse import XverseForCausalLM

    AutoConfig.register("xverse", XverseConfig, exist_ok=True)
    AutoModelForCausalLM.register(XverseConfig, XverseForCausalLM, exist_ok=True)
    __all__ += ["XverseConfig", "XverseForCausalLM"]
