"""What stands around a model: DDP, FSDP, torch.compile, checkpoint wrappers. Paths without them, and whole weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# what FSDP, torch's checkpoint wrapper and torch.compile put into the paths of what they wrap
_PARTS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def plain_path(path: str) -> str:
    """Return a module's path as it is in the model that nothing wraps."""
    return ".".join(part for part in path.split(".") if part not in _PARTS)


def peeled(module: nn.Module) -> nn.Module:
    """Return what all wrappers stand around, or `module` itself; an adapter is no wrapper."""
    while True:
        names = ["module"] if isinstance(module, _PARALLEL) else [part for part in _PARTS if part in module._modules]
        if not names:
            return module
        inner = module._modules[names[0]]
        assert inner is not None
        module = inner


def is_sharded(model: nn.Module) -> bool:
    """Tell whether FSDP (either kind) holds the model's weights: they are whole inside its own calls alone."""
    fsdp = _fsdp()
    kinds = (fsdp.FullyShardedDataParallel, fsdp.FSDPModule) if fsdp else ()
    return any(isinstance(module, kinds) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Have FSDP2 take its weights apart again; after a forward pass the outermost ones are left whole."""
    fsdp = _fsdp()
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def each_weight(
    model: nn.Module, modules: Mapping[str, nn.Module], *, write: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weight of each of `modules` of `model` by its name, whole until the next: one FSDP unit at a time.

    With `write` what was changed is kept. Weights of FSDP2 stay sharded, for `whole` and `assign`. Every process has
    to call this, as every process calls the model.
    """
    reshard(model)  # what is written to a weight that FSDP2 put together is lost
    fsdp = _fsdp()
    units = [] if fsdp is None else fsdp.FullyShardedDataParallel.fsdp_modules(model)
    for unit in units[:1]:
        unit.check_is_root()  # sets up all units inside; one that is asked before it takes itself for the root
    owners = {module: unit for unit in units for module in unit.modules()}  # an inner unit comes after its outer one
    names_of: dict[nn.Module | None, list[str]] = {}
    for name, module in modules.items():
        names_of.setdefault(owners.get(module), []).append(name)
    for unit, names in names_of.items():
        here: AbstractContextManager[None] = nullcontext()
        if fsdp is not None and unit is not None:
            here = fsdp.FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=write)
        with here:
            for name in names:
                with _loaded(modules[name]):
                    weight = modules[name].weight
                    assert isinstance(weight, Tensor)
                    yield name, weight


def _loaded(module: nn.Module) -> AbstractContextManager[Any]:
    """Have weights that accelerate's offloading moved away at hand."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    loaded: AbstractContextManager[Any] = align_module_device(module)
    return loaded


def whole(weight: Tensor) -> Tensor:
    """Return the whole of a weight that FSDP2 shards, or `weight` itself."""
    gathered = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    assert isinstance(gathered, Tensor)
    return gathered


def assign(weight: Tensor, value: Tensor) -> None:
    """Copy `value` into `weight` in place, to each process its part where FSDP2 shards it."""
    if hasattr(weight, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(weight, DTensor)
        value = distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
    weight.copy_(value)


def eager() -> AbstractContextManager[Any]:
    """Have compiled modules run as they were written: hooks do not fire in what was compiled before them."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and the import is slow
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _fsdp() -> ModuleType | None:
    """Return FSDP's module where somebody imported it: without, nothing can be wrapped in it."""
    return sys.modules.get("torch.distributed.fsdp")
