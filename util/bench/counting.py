"""Count the arithmetic and the memory traffic of a piece of code while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

# Compiled code is run eagerly here, because its operators cannot be counted.


def count_flops(work: Callable[[], object]) -> int:
    """Return the FLOPs of the matrix products, 2 per multiply-add; attention counts as its two products."""
    counter = FlopCounterMode(display=False)
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), counter:
        work()
    return counter.get_total_flops()


def count_traffic(work: Callable[[], object]) -> int:
    """Return the bytes that eager operators read and write; a fused kernel moves less."""
    with torch.compiler.set_stance("force_eager"), TrafficMode() as counter:
        work()
    return counter.bytes


class TrafficMode(TorchDispatchMode):
    """Add up the bytes that each operator reads and writes; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count the bytes of its tensors."""
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        name, arguments = operator._schema.name, named_arguments(operator, args, kwargs)
        changed = {a.name for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        inputs = distinct(arguments)
        outputs = {storage: size for storage, size in distinct(result).items() if storage not in inputs}
        written = distinct([arguments.get(argument) for argument in changed]) | outputs
        if written and not name.startswith(("aten::empty", "aten::new_empty")):
            self.bytes += sum(written.values())
            if not name.endswith(("_like", "::zero_", "::fill_", "::new_zeros")):  # these read only a shape
                overwritten = {"self"} if name.endswith("::copy_") else {"out"}
                read = [value for argument, value in arguments.items() if argument not in overwritten]
                self.bytes += sum(distinct(read).values())
        return result


def named_arguments(operator: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Return the arguments of the operator by name."""
    names = [argument.name for argument in operator._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def distinct(tree: Any) -> dict[int, int]:
    """Return the bytes that the tensors of the tree use in each storage, by the storage's address.

    An expanded dimension counts once, and no storage counts more than its size.
    """
    sizes: dict[int, int] = {}
    for x in tree_leaves(tree):
        if isinstance(x, Tensor):
            storage = x.untyped_storage()
            own = x.element_size() * math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
            sizes[storage._cdata] = min(sizes.get(storage._cdata, 0) + own, storage.nbytes())
    return sizes
