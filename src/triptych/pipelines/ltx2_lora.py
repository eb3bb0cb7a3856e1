"""The LoRA of LTX-2's second stage: a file of the repository that a request names, on in that stage alone.

Oracle: `load_lora_weights(..., weight_name=...)` and `set_adapters` of diffusers' LTX-2 pipelines before the second call,
as their documentation does it. What a file changes in the transformer is loaded in the denoiser; what it changes in the
connectors, in the encoder, which then makes text for the second stage alone. LoRAs of the request itself (`lora`) are on
in both stages, and come first.
"""

from __future__ import annotations

import math
from typing import Any

from triptych.components.lora import Lora, LoraDesk, read
from triptych.components.lora_files import Place
from triptych.errors import ParameterError, did_you_mean
from triptych.state import View


def parameters() -> dict[str, object]:
    """Return the request parameters and their defaults: the file's name in the repository (none: ""), its weight."""
    return {"stage_2_lora": "", "stage_2_lora_scale": 1.0}


def settle(given: dict[str, Any], desk: LoraDesk) -> None:
    """Check the parameters, and put in the name's place what the file's header says of it.

    Raises:
        ParameterError: one is not accepted, or the file is no LoRA of this model.
        UsageError: PEFT is not installed.
    """
    scale, name = given["stage_2_lora_scale"], given["stage_2_lora"]
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ParameterError("stage_2_lora_scale", scale, "a finite number is accepted")
    if name == "":
        return
    known = desk.repository.loras()
    if name not in known:
        has = f"the repository has {', '.join(known)}" if known else "the repository has none"
        hint = did_you_mean(name, known) if isinstance(name, str) else ""
        accepted = f"a safetensors file beside the components, with `lora` in its name, is accepted; {has}{hint}"
        raise ParameterError("stage_2_lora", name, accepted)
    lora = desk.admit(Place("", None, name), float(scale), field="stage_2_lora", told=name)
    if "transformer" not in lora.components:
        raise ParameterError("stage_2_lora", name, "it holds no LoRA of LTX-2's transformer")
    given["stage_2_lora"] = lora.to_field()


def of_second_stage(state: View) -> tuple[Lora, ...]:
    """Return the second stage's own LoRA, if the request names one."""
    return read([state.stage_2_lora] if state.stage_2_lora else [])
