"""A step's samples to one buffer and back to tensors: bits, unknown truth, read-only memory, odd sizes."""

import warnings

import numpy as np
import pyarrow as pa
import pytest
import torch

from cast_ray.data.batches import collate, from_buffer, join, to_batch, to_buffer, unpack_bits

TRUTH = ("truth_instance", "truth_class")


def _sample(seed=0, size=(32, 32), instances=0, crowd=False, truth=True, strong=True):
    rng = np.random.default_rng(seed)
    weak = rng.integers(0, 256, (3, *size), dtype=np.uint8)
    unknown = np.full(size, -1, dtype=np.int16)
    return {
        "weak": weak,
        "strong": rng.integers(0, 256, (3, *size), dtype=np.uint8) if strong else weak,
        "valid": rng.random(size) < 0.9,
        "masks": rng.random((instances, *size)) < 0.3,
        "labels": rng.integers(0, 4, instances),
        "weights": rng.random(instances, dtype=np.float32),
        "ignore": (rng.random(size) < 0.1) & crowd,
        **{name: rng.integers(0, 5, size).astype(np.int16) if truth else unknown for name in TRUTH},
    }


def _step():
    return [_sample(0, instances=3), _sample(1), _sample(2, instances=1, crowd=True), _sample(3, truth=False)]


def _assert_batch_is(batch, samples, num_labelled):
    assert batch.num_labelled == num_labelled and len(batch.targets) == len(samples)
    assert batch.valid.dtype == torch.bool and batch.weak.dtype == torch.uint8
    assert batch.truth_instance.dtype == batch.truth_class.dtype == torch.int16
    for index, (sample, target) in enumerate(zip(samples, batch.targets)):
        for name in ("weak", "strong", "valid", *TRUTH):
            np.testing.assert_array_equal(getattr(batch, name)[index].numpy(), sample[name])
        np.testing.assert_array_equal(target.masks.numpy(), sample["masks"])
        np.testing.assert_array_equal(target.labels.numpy(), sample["labels"])
        np.testing.assert_array_equal(target.weights.numpy(), sample["weights"])
        assert target.masks.dtype == torch.bool and target.labels.dtype == torch.int64
        assert (target.ignore is None) == (not sample["ignore"].any())
        if target.ignore is not None:
            np.testing.assert_array_equal(target.ignore.numpy(), sample["ignore"])


def test_a_step_through_a_buffer():
    arrays = from_buffer(to_buffer(collate(_step(), 3)))
    assert arrays["masks"].shape == (4, 32 * 32 // 8) and arrays["num_instances"].tolist() == [3, 0, 1, 0]
    _assert_batch_is(to_batch(arrays), _step(), 3)
    _assert_batch_is(to_batch(join(collate(_step(), 3))), _step(), 3)


def test_a_buffer_is_read_in_place():
    buffer = to_buffer(collate(_step(), 3))
    weak = from_buffer(buffer)["weak"]
    weak[0, 0, 0, 0] ^= 255
    assert from_buffer(buffer)["weak"][0, 0, 0, 0] == weak[0, 0, 0, 0]
    assert all(array.ctypes.data % array.itemsize == 0 for array in from_buffer(buffer).values())


def test_read_only_memory_from_arrow():
    buffer = pa.array([to_buffer(collate(_step(), 3)).tobytes()], pa.large_binary())[0].as_buffer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of tensors that share memory nobody may write
        batch = to_batch(from_buffer(buffer))
    _assert_batch_is(batch, _step(), 3)
    assert buffer.address < batch.weak.data_ptr() < buffer.address + buffer.size  # not copied


def test_what_nobody_knows_does_not_travel():
    known = collate([_sample(i) for i in range(4)], 4)
    parts = collate([_sample(i, truth=False, strong=False) for i in range(4)], 0)
    assert not {"strong", *TRUTH} & set(parts)
    assert to_buffer(parts).nbytes < 0.5 * to_buffer(known).nbytes
    _assert_batch_is(to_batch(join(parts)), [_sample(i, truth=False, strong=False) for i in range(4)], 0)


def test_a_step_without_any_instance_and_with_odd_size():
    samples = [_sample(seed, size=(7, 9)) for seed in range(2)]
    batch = to_batch(from_buffer(to_buffer(collate(samples, 0))))
    _assert_batch_is(batch, samples, 0)
    assert batch.targets[0].masks.shape == (0, 7, 9)


@pytest.mark.parametrize("count", [1, 8, 63, 1000])
def test_bits_unpacked_on_a_device_are_numpys(count):
    masks = np.random.default_rng(count).random((5, count)) < 0.5
    found = unpack_bits(torch.from_numpy(np.packbits(masks, axis=1)), count)
    assert found.dtype == torch.bool
    np.testing.assert_array_equal(found.numpy(), masks)
