"""The table of a family's flavours."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import TypeVar

from torchtitan.protocols.model import BaseModelArgs

Args = TypeVar("Args", bound=BaseModelArgs)


class Flavors(Mapping[str, Args]):
    """Read-only mapping from flavour name to model arguments.

    A look-up returns a copy: TorchTitan calls `update_from_config` on what it finds, which must
    not change the table for the next look-up. An unknown name is answered with the known ones.

    Args:
        family: Name of the model family, for the error message.
        table: Flavour name -> model arguments.
    """

    def __init__(self, family: str, table: Mapping[str, Args]) -> None:
        self._family = family
        self._table = dict(table)

    def __getitem__(self, flavor: str) -> Args:
        if flavor not in self._table:
            raise KeyError(
                f"model.flavor = {flavor!r} is not a flavour of {self._family!r}; "
                f"known flavours: {', '.join(self._table)}"
            )
        return deepcopy(self._table[flavor])

    def __contains__(self, flavor: object) -> bool:
        return flavor in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)
