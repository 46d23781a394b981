"""Reading weights into a network that is already built; refusing those not its own or not sound."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from ospq_export.errors import InputError

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Fills `model` from a file, adapted by timm's own checkpoint filter where names or sizes differ.

    Args:
        model: The network to fill.
        path: A .safetensors file, or a torch file with a state dictionary, plain or under `state_dict`,
            `model` or their `_ema` forms; torch files are read without unpickling any code.

    Raises:
        InputError: The file cannot be read, or its tensors are not this network's.
    """
    state = _read_checkpoint(path)
    expected = model.state_dict()
    mismatch = _mismatch(state, expected)
    if mismatch:
        state, mismatch = _adapted(state, model, mismatch)
        if mismatch:
            raise InputError(
                f"the checkpoint is not of this model: {_summary(mismatch)}",
                where=path,
                mend="check the model's name and --model-kwargs",
            )
        logger.warning("%s: adapted to the network by timm's own checkpoint filter", path)
    model.load_state_dict(state)


def _read_checkpoint(path: Path) -> StateDict:
    """The tensors in a .safetensors file, or in a torch file read without unpickling any code."""
    try:
        # Opened first, for the system's word on a file that is not there: timm has none.
        path.open("rb").close()
        state = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:
        raise InputError(
            f"the checkpoint cannot be read: {first_line(error)}",
            where=path,
            mend="give a .safetensors file, or a torch file that holds tensors only",
        ) from error
    strangers = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strangers or not state:
        raise InputError(
            f"the checkpoint holds no state dictionary, but {_listed(strangers) or 'nothing'}",
            where=path,
            mend="save model.state_dict(), plain or under the key 'state_dict'",
        )
    return state


def _mismatch(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """How `state` differs from what the network expects: kind of difference to the tensors concerned."""

    def kind(tensor: Tensor) -> str:
        return f"{tuple(tensor.shape)}" + ("" if tensor.is_floating_point() else f" {tensor.dtype}")

    found = {
        "missing": [key for key in expected if key not in state],
        "unknown": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} is {kind(state[key])}, the model's {kind(expected[key])}"
            for key in expected
            if key in state and kind(state[key]) != kind(expected[key])
        ],
    }
    return {name: keys for name, keys in found.items() if keys}


def _adapted(
    state: StateDict, model: nn.Module, mismatch: dict[str, list[str]]
) -> tuple[StateDict, dict[str, list[str]]]:
    """`state` through the checkpoint filter of the model's own timm module, if that makes it fit."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return state, mismatch
    try:
        adapted = adapt(dict(state), model)
    except Exception:
        # The filters trust their input; one that falls over has met another model's weights.
        return state, mismatch
    rest = _mismatch(adapted, model.state_dict())
    return (adapted, rest) if not rest else (state, mismatch)


def check_finite(model: nn.Module, where: str) -> None:
    """Raises InputError with the names of the tensors that hold NaN or infinity; `where` they came from."""
    broken = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if broken:
        raise InputError(
            f"weights are NaN or infinite: {_listed(broken)}", where=where, mend="give sound weights"
        )


def _summary(mismatch: dict[str, list[str]]) -> str:
    return "; ".join(f"{len(keys)} {kind}: {_listed(keys)}" for kind, keys in mismatch.items())


def _listed(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more


def first_line(error: Exception) -> str:
    """The first line of what `error` says, or its kind where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
