"""The bench's device and machine."""

import pytest

from benchmarks.conditions import WrongDeviceError, machine, processor_name, resolve_device


def test_the_device_is_vllm_s():
    assert resolve_device(None, "cpu") == resolve_device("cpu", "cpu") == "cpu"
    assert resolve_device(None, "cuda") == resolve_device("gpu", "cuda") == "gpu"


@pytest.mark.parametrize(("wanted", "device_type"), [("gpu", "cpu"), ("cpu", "cuda")])
def test_another_device_is_refused(wanted, device_type):
    with pytest.raises(WrongDeviceError, match=f"make install DEVICE={wanted}"):
        resolve_device(wanted, device_type)


def test_a_device_without_pruning_is_refused():
    with pytest.raises(WrongDeviceError, match=r"'tpu'.*supports cpu, cuda"):
        resolve_device(None, "tpu")


def test_the_machine_has_versions_and_a_processor():
    told = machine()
    assert told["vllm"].startswith("0.32.")
    assert told["torch"][0].isdigit()
    assert told["processor"] == processor_name() != ""
    assert told["cpus"] >= 1
