"""Which device a bench is on."""

import pytest

from benchmarks.conditions import WrongDeviceError, machine, processor_name, settle_device


def test_the_device_is_the_one_that_vllm_runs_on():
    assert settle_device(None, "cpu") == settle_device("cpu", "cpu") == "cpu"
    assert settle_device(None, "cuda") == settle_device("gpu", "cuda") == "gpu"


@pytest.mark.parametrize(("asked", "device_type"), [("gpu", "cpu"), ("cpu", "cuda")])
def test_another_is_refused(asked, device_type):
    with pytest.raises(WrongDeviceError, match=f"make install DEVICE={asked}"):
        settle_device(asked, device_type)


def test_a_device_that_pruning_does_not_run_on():
    with pytest.raises(WrongDeviceError, match=r"'tpu'.*runs on cpu, cuda"):
        settle_device(None, "tpu")


def test_the_machine():
    told = machine()
    assert told["vllm"].startswith("0.32.")
    assert told["torch"][0].isdigit()
    assert told["processor"] == processor_name() != ""
    assert told["cpus"] >= 1
