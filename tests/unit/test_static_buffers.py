"""Memory that is written again and again stays where it is."""

import torch

from wan_autoregressive.cache.static_buffers import StaticBuffers


def test_a_name_keeps_its_place_for_anything_no_larger():
    memory = StaticBuffers()
    first = memory.copy_in("a", torch.arange(12.0).view(3, 4))
    place = first.data_ptr()
    second = memory.copy_in("a", torch.ones(2, 5))
    assert second.data_ptr() == place
    assert torch.equal(second, torch.ones(2, 5))
    assert second.is_contiguous()
    assert first.flatten().tolist() == [1.0] * 10 + [10.0, 11.0]  # overwritten as far as the second one goes
    assert memory.copy_in("a", first.clone()).data_ptr() == place
    assert memory.nbytes == 12 * 4


def test_names_are_apart_and_larger_tensors_move():
    memory = StaticBuffers()
    tensors = [memory.copy_in(name, torch.zeros(4)) for name in ("a", "b", ("b", 2))]
    assert len({tensor.data_ptr() for tensor in tensors}) == 3
    larger = memory.copy_in("a", torch.ones(5))
    assert larger.data_ptr() != tensors[0].data_ptr()
    assert not tensors[0].any()
    assert memory.nbytes == (5 + 4 + 4) * 4


def test_another_dtype_or_device_has_memory_of_its_own():
    memory = StaticBuffers()
    held = memory.copy_in("a", torch.full((3,), 1.5), torch.float64)
    assert (held.dtype, held.tolist()) == (torch.float64, [1.5] * 3)
    assert memory.copy_in("a", torch.ones(3)).dtype == torch.float32
    assert memory.nbytes == 3 * 4
    assert memory.empty("a", (3,), torch.float32, "meta").device.type == "meta"


def test_clear_frees_it():
    memory = StaticBuffers()
    memory.copy_in("a", torch.ones(3))
    memory.clear()
    assert memory.nbytes == 0
    assert memory.copy_in("a", torch.ones(3)).tolist() == [1.0] * 3
