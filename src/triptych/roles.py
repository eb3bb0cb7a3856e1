"""Roles: who runs what, and which components a role owns by default."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from enum import Enum

from triptych.errors import RoleError, did_you_mean


class RoleType(str, Enum):
    """What a process does. Parsed case-insensitively; `denoising` is another name for `denoiser`."""

    MONOLITHIC = "monolithic"
    ENCODER = "encoder"
    DENOISER = "denoiser"
    DECODER = "decoder"
    SERVER = "server"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> RoleType:
        name = value.strip().lower() if isinstance(value, str) else value
        if name == "denoising":
            return cls.DENOISER
        for role in cls:
            if role.value == name:
                return role
        choices = [role.value for role in cls]
        hint = did_you_mean(name, choices) if isinstance(name, str) else ""
        raise RoleError(f"unknown role {value!r}{hint}; choose one of: {', '.join(choices)}")


WORKERS = (RoleType.ENCODER, RoleType.DENOISER, RoleType.DECODER)
"""The roles that run stages, in the order requests meet them."""

_DEFAULT_ROLE = {
    RoleType.ENCODER: (
        "text_encoder tokenizer image_encoder image_processor processor connectors vision_language_encoder "
        "feature_extractor duration_head prompt_enhancer hy3dshape_conditioner hy3dshape_image_processor"
    ),
    RoleType.DENOISER: "transformer unconditional_transformer video_dit audio_dit dual_tower_bridge hy3dshape_model",
    RoleType.DECODER: "vae video_vae audio_vae vocoder diffusion_decoder hy3dshape_vae",
}
_ROLE_OF = {name: role for role, names in _DEFAULT_ROLE.items() for name in names.split()}


def get_module_role(name: str) -> RoleType | None:
    """Return the role that owns a component by default, from its name in `model_index.json`.

    A numeric suffix does not matter (`text_encoder_2` belongs where `text_encoder` does). `None` means that no single
    role owns it: schedulers, and every name that is not known.
    """
    return _ROLE_OF.get(re.sub(r"_\d+$", "", name))


def filter_modules_for_role(
    names: Iterable[str], role: RoleType | str, *, extra_allowed_modules: Collection[str] = frozenset()
) -> list[str]:
    """Keep the names that `role` owns by default, the shared ones and those explicitly allowed, in the given order.

    `monolithic` and `server` keep all. This is only the default split by name: what a role really loads is what its
    stages' needs say.

    Raises:
        RoleError: `role` is not a role.
    """
    role = RoleType(role)
    if role in (RoleType.MONOLITHIC, RoleType.SERVER):
        return list(names)
    return [name for name in names if get_module_role(name) in (role, None) or name in extra_allowed_modules]


def parse_roles(text: RoleType | str) -> frozenset[RoleType]:
    """Return the working roles that a role name stands for: one, several joined by `+`, or all for `monolithic`.

    `server` runs no stage and gives the empty set.

    Raises:
        RoleError: a part is not a role, or `monolithic`/`server` is joined with others.
    """
    if isinstance(text, RoleType):
        parts = [text]
    elif isinstance(text, str):
        parts = [RoleType(part) for part in text.split("+")]
    else:
        raise RoleError(f"a role is a name such as 'encoder', not {text!r}")
    if len(parts) > 1 and (alone := [part for part in parts if part not in WORKERS]):
        raise RoleError(f"{text!r}: {alone[0].value!r} cannot be joined with other roles")
    if parts == [RoleType.MONOLITHIC]:
        return frozenset(WORKERS)
    return frozenset(part for part in parts if part in WORKERS)


def role_name(roles: Collection[RoleType]) -> str:
    """Return the name of a set of working roles: `monolithic` for all, `server` for none, else joined by `+`."""
    if not roles:
        return RoleType.SERVER.value
    if set(roles) == set(WORKERS):
        return RoleType.MONOLITHIC.value
    return "+".join(role.value for role in WORKERS if role in roles)
