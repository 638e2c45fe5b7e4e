"""Names of targets on other devices."""

from __future__ import annotations

import pytest

from deploykit.errors import UsageError
from deploykit.targets.registry import get_target
from deploykit.targets.remote.address import Address, parse


@pytest.mark.parametrize(
    ("name", "address", "target"),
    [
        ("ssh://board/mobile-ncnn", Address("ssh", "board"), "mobile-ncnn"),
        (
            "ssh://pi@10.0.0.7:2222/mobile-ncnn",
            Address("ssh", "10.0.0.7", "pi", 2222),
            "mobile-ncnn",
        ),
        ("ssh://me@[fe80::1]:22/mobile-ncnn", Address("ssh", "fe80::1", "me", 22), "mobile-ncnn"),
        ("ssh://board?tmp=/mnt/x", Address("ssh", "board", tmp="/mnt/x"), ""),
        (
            "ssh://board/mobile-ncnn?python=/opt/v/bin/python",
            Address("ssh", "board", python="/opt/v/bin/python"),
            "mobile-ncnn",
        ),
        ("adb:R58M/mobile-litert", Address("adb", "R58M"), "mobile-litert"),
        ("adb:127.0.0.1:5555/mobile-ncnn", Address("adb", "127.0.0.1:5555"), "mobile-ncnn"),
        ("adb:emulator-5554", Address("adb", "emulator-5554"), ""),
    ],
)
def test_names_are_taken_apart(name: str, address: Address, target: str) -> None:
    assert parse(name) == (address, target)
    again = parse(f"{address.device}/{target}")[0]
    assert (again.kind, again.host, again.user, again.port) == (
        address.kind, address.host, address.user, address.port,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "ssh:///mobile-ncnn",
        "ssh://-oProxyCommand=x/mobile-ncnn",
        "ssh://-l@host/mobile-ncnn",
        "ssh://user:secret@host/mobile-ncnn",
        "ssh://host:port/mobile-ncnn",
        "ssh://ho st/mobile-ncnn",
        "ssh://$(touch x)/mobile-ncnn",
        "ssh:host/mobile-ncnn",
        "adb:/mobile-ncnn",
        "adb:-s/mobile-ncnn",
        "adb:a;b/mobile-ncnn",
        "adb:a b/mobile-ncnn",
        "ssh://host/mobile-ncnn?pyhton=/x",
        "ssh://host/mobile-ncnn?python=$(x)",
        "ssh://host/mobile-ncnn?python=-c",
        "ssh://host/",
        "ssh://host/cpu-nothing",
        "ssh://host/ssh://other/mobile-ncnn",
    ],
)
def test_what_cannot_be_a_device_is_one_line_and_nothing_is_run(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        get_target(name)
    assert "\n" not in str(caught.value)


def test_a_remote_target_takes_the_facts_of_the_one_it_runs() -> None:
    """Without asking the device: recipes are checked before anything is connected."""
    there, here = get_target("ssh://nowhere.invalid/cpu-onnxruntime"), get_target("cpu-onnxruntime")
    assert (there.formats, there.exporter) == (here.formats, here.exporter)
    assert there.name == "ssh://nowhere.invalid/cpu-onnxruntime"
