"""Values derived from a tensor, kept for as long as the tensor lives unchanged.

Kernels want codes in layouts of their own. Those are made from the codes when first needed, and are
never part of a model: nothing of them is saved, copied or moved with it.
"""

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class _Entry(NamedTuple):
    tensor: weakref.ref[Tensor]
    others: tuple[weakref.ref[Tensor], ...]
    state: tuple[Any, ...]
    value: Any


class TensorCache(Generic[Value]):
    """Maps (tensor, key) to a value, by the identity of the tensor and not by its content.

    A value is made anew once the tensor was edited in place, resized or given other storage. Edits
    that PyTorch does not count stay unnoticed: those through `tensor.data`, NumPy, raw pointers or
    collectives of `torch.distributed`. Tensors made under `torch.inference_mode()` count no edits
    at all; ask [`can_hold`] first.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[int, Hashable], _Entry] = {}
        self._lock = threading.Lock()

    @staticmethod
    def can_hold(tensor: Tensor) -> bool:
        """Whether edits of the tensor can be noticed."""
        return not tensor.is_inference()

    def get(
        self,
        tensor: Tensor,
        key: Hashable,
        make: Callable[[], Value],
        others: tuple[Tensor, ...] = (),
    ) -> Value:
        """The value of (tensor, key), made by `make()` unless it is there.

        Where it derives from `others` as well, it is made anew once one of those was edited or
        another tensor takes its place. The value must not refer to the tensors, which would keep
        all alive for ever.
        """
        # The state is read before the value is made: the next call finds an edit made meanwhile.
        state = tuple(map(_state, (tensor, *others)))
        place = (id(tensor), key)
        value = self._find(tensor, others, place, state)
        if value is None:
            with self._lock:  # one thread makes it, the others wait
                value = self._find(tensor, others, place, state)
                if value is None:
                    value = make()
                    reference = weakref.ref(tensor, self._forgetter(place))
                    beside = tuple(map(weakref.ref, others))
                    self._entries[place] = _Entry(reference, beside, state, value)
        return value

    def __len__(self) -> int:
        return len(self._entries)

    def _find(
        self,
        tensor: Tensor,
        others: tuple[Tensor, ...],
        place: tuple[int, Hashable],
        state: tuple[Any, ...],
    ) -> Any:
        entry = self._entries.get(place)
        if entry is None or entry.tensor() is not tensor or entry.state != state:
            return None
        # An address may be given out again once its tensor is gone.
        if any(was() is not other for was, other in zip(entry.others, others, strict=True)):
            return None
        return entry.value

    def _forgetter(self, place: tuple[int, Hashable]) -> Callable[[weakref.ref[Tensor]], None]:
        def forget(reference: weakref.ref[Tensor]) -> None:
            entry = self._entries.get(place)
            if entry is not None and entry.tensor is reference:
                del self._entries[place]

        return forget


def _state(tensor: Tensor) -> tuple[Any, ...]:
    return tensor._version, tensor.data_ptr(), tensor.shape, tensor.stride()
