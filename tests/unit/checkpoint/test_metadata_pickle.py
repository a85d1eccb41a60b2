"""The pickle of `.metadata` may name an enum's member by getattr, as Python 3.11.0 to 3.11.3 do."""

import io
import pickle
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from torchtitan.checkpoint.dcp_io import UnsafeMetadata, _Unpickler


class ByGetattr:
    def __init__(self, owner: Any, name: str):
        self.asked = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.asked


def read(owner: Any, name: str) -> Any:
    return _Unpickler(io.BytesIO(pickle.dumps(ByGetattr(owner, name)))).load()


@pytest.mark.parametrize("member", list(_MEM_FORMAT_ENCODING), ids=lambda member: member.name)
def test_a_member_is_read(member: _MEM_FORMAT_ENCODING):
    assert read(_MEM_FORMAT_ENCODING, member.name) is member


@pytest.mark.fault("F57")
@pytest.mark.parametrize(
    ("owner", "name"),
    [(_MEM_FORMAT_ENCODING, "__class__"), (Metadata, "__init__"), (torch.Size, "count")],
)
def test_nothing_else_is_got_by_it(owner: Any, name: str):
    with pytest.raises(UnsafeMetadata, match=name):
        read(owner, name)
