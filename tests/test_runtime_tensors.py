"""Between torch, numpy and the bytes that travel: values, aliasing, and checks of finiteness."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pimoe.runtime.errors import ConfigurationError
from pimoe.runtime.numerics import all_finite
from pimoe.runtime.requests import DTYPE_BYTES, TensorData
from pimoe.runtime.tensors import array_from_wire, array_to_wire, from_wire, to_wire, torch_dtype

FLOATING = ["float64", "float32", "float16", "bfloat16"]


@pytest.mark.parametrize("name", DTYPE_BYTES)
@pytest.mark.parametrize("shape", [(2, 3), (5,), (), (0, 4), (2, 1, 3)])
def test_every_dtype_and_shape_comes_back_equal(name: str, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(torch_dtype(name))
    data = to_wire(tensor)
    assert (data.dtype, data.shape, data.nbytes) == (name, shape, DTYPE_BYTES[name] * math.prod(shape))
    copy = from_wire(data)
    assert copy.dtype == tensor.dtype
    assert torch.equal(copy, tensor)


def test_a_contiguous_tensor_is_not_copied() -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    data = to_wire(tensor)
    tensor[0, 0] = 42.0
    copy = from_wire(data)
    assert copy[0, 0] == 42.0
    copy[1, 2] = 7.0
    assert tensor[1, 2] == 7.0


def test_a_transposed_tensor_travels_in_c_order() -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3).T
    assert torch.equal(from_wire(to_wire(tensor)), tensor)


def test_tensors_that_require_gradients_can_travel() -> None:
    assert torch.equal(from_wire(to_wire(torch.ones(3, requires_grad=True))), torch.ones(3))


@pytest.mark.parametrize("wrap", [bytes, lambda raw: memoryview(bytes(raw))])
def test_read_only_bytes_are_copied_and_never_written(wrap: type) -> None:
    raw = np.arange(4, dtype=np.float32).tobytes()
    data = TensorData("float32", (4,), wrap(raw))
    from_wire(data).zero_()
    assert bytes(data.data) == raw


def test_missing_bytes_never_become_uninitialised_memory() -> None:
    with pytest.raises(RuntimeError):
        from_wire(TensorData("float32", (2, 3), b""))
    with pytest.raises(RuntimeError):
        from_wire(TensorData("float32", (2, 3), bytes(20)))


def test_dtypes_by_name() -> None:
    for name in DTYPE_BYTES:
        assert torch_dtype(name) == getattr(torch, name)
    with pytest.raises(ConfigurationError, match=r"float8.*float64"):
        torch_dtype("float8")


@pytest.mark.parametrize("array", [np.arange(3, dtype=np.int32), np.ones(2, np.float32), np.zeros(0, np.int32)])
def test_numpy_arrays_come_back_equal_without_a_copy(array: np.ndarray) -> None:
    data = array_to_wire(array)
    assert data.nbytes == array.nbytes
    copy = array_from_wire(data)
    assert copy.dtype == array.dtype
    assert np.array_equal(copy, array)
    assert array.size == 0 or np.shares_memory(copy, array)


@pytest.mark.parametrize("name", FLOATING)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_found(name: str, poison: float) -> None:
    tensor = torch.full((3, 5), -1.5).to(torch_dtype(name))
    assert all_finite(to_wire(tensor))
    tensor[2, 4] = poison
    assert not all_finite(to_wire(tensor))


@pytest.mark.parametrize("name", FLOATING)
def test_the_largest_finite_value_is_finite(name: str) -> None:
    dtype = torch_dtype(name)
    assert all_finite(to_wire(torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)))


@pytest.mark.parametrize("name", DTYPE_BYTES)
def test_empty_tensors_and_integers_are_finite(name: str) -> None:
    assert all_finite(TensorData(name, (0, 3), b""))
    if name.startswith("int"):
        assert all_finite(to_wire(torch.tensor([-1, 2**31 - 1]).to(torch_dtype(name))))
