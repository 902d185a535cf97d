"""The emulator: right kernels run in every order of threads; each planted bug is reported, with what and where."""

import re

import pytest

from mmfast import native

# what the emulator must say of each planted bug; a line of the kernel is named where one is to blame
REPORTS = {
    (
        "reverse",
        "missing barrier",
    ): r"(reads byte \d+ of shared memory at selftest.cpp:\d+, which no thread has written|race)",
    (
        "reverse",
        "missing barrier before reuse",
    ): r"race: it (reads|writes) byte \d+ .*which thread \d+ (wrote|or another reads) at line \d+",
    (
        "reverse",
        "off by one",
    ): r"block 1, thread 127: it reads element 256 of input 1, which has 256 elements, at line \d+",
    ("reverse", "off by one inside"): r"wrong result: y\[0\]",
    ("reverse", "off by one in shared memory"): r"thread 127: it uses element 128 of a shared array of 128 at line \d+",
    ("reverse", "race"): r"race: it writes byte \d+ .*which thread \d+ wrote at line \d+, with no barrier between",
    (
        "reverse",
        "divergent barrier",
    ): r"divergent barrier: it reached .*selftest.cpp:\d+ while \d+ other threads .*selftest.cpp:\d+",
    (
        "reverse",
        "early exit",
    ): r"deadlock: 127 threads wait at a barrier \(selftest.cpp:\d+; .*; 1 have left the kernel",
    (
        "reverse",
        "unwritten shared memory",
    ): r"reads byte 28 of shared memory at selftest.cpp:\d+, which no thread has written",
    ("reverse", "unwritten output"): r"element 3 of output 1 was not written",
    (
        "reverse",
        "two writers",
    ): r"race: it writes \(selftest.cpp:\d+\) element 8 of output 1, which thread \d+ of block 0 wrote",
    ("reverse", "past the end"): r"output 1 was written 1 bytes past its end",
    ("reverse", "before the begin"): r"output 1 was written 1 bytes before its begin",
    ("reverse", "too much shared memory"): r"its arrays need 516 bytes of shared memory, the launch gave 512",
    ("sum", "wrong lane"): r"wrong result: y\[0\]",
    ("sum", "lane outside the mask"): r"it reads lane \d+, which is not in the mask [0f]{8} of the shuffle at line \d+",
    ("sum", "overlapping masks"): r"(overlapping masks|deadlock: .*threads wait at a warp collective)",
    (
        "sum",
        "divergent collective",
    ): r"divergent collective: it reached .*selftest.cpp:\d+ while other lanes .*selftest.cpp:\d+",
    ("sum", "missing lane"): r"deadlock: 124 threads wait at a warp collective \(selftest.cpp:\d+; .*; 4 have left",
    ("twice", "misaligned vector"): r"misaligned vector: it accesses 16 bytes at 0x[0-9a-f]+ at line \d+",
    (
        "scan",
        "missing warp barrier",
    ): r"race: it (reads|writes) byte \d+ of shared memory at selftest.cpp:\d+, which thread \d+",
    (
        "rotate",
        "missing barrier before reuse",
    ): r"race: it (reads|writes) byte \d+ .*which thread \d+ (wrote|or another reads)",
    ("count", "plain access beside atomics"): r"race: it (reads|writes) byte 0 of shared memory",
    ("multiply_float16", "swapped fragment"): r"wrong result: y\[\d+\]",
    ("multiply_float16", "swapped operand"): r"wrong result: y\[\d+\]",
    ("multiply_float16", "wrong matrix row"): r"wrong result: y\[7?\d\]",
    ("multiply_bfloat16", "swapped fragment"): r"wrong result: y\[\d+\]",
    ("multiply_tf32", "swapped fragment"): r"wrong result: y\[\d+\]",
    ("multiply_tf32", "swapped operand"): r"wrong result: y\[\d+\]",
    ("copy", "missing wait"): r"it uses byte \d+ .*into which thread \d+ copies since line \d+ without having waited",
    ("copy", "waits for too few"): r"it uses byte \d+ .*into which thread \d+ copies since line \d+ without",
    ("copy", "missing barrier after the wait"): r"(thread \d+ wrote|copies since line|no thread has written)",
    ("copy", "buffer reused too early"): r"(race: it writes byte|copies since line \d+ without|no thread has written)",
    ("exchange", "wrong cluster rank"): r"(deadlock: .*wait at a barrier in shared memory|no thread has written)",
    ("exchange", "rank outside the cluster"): r"it stores into block 4 of a cluster of 4 at selftest.cpp:\d+",
    ("exchange", "missing wait"): r"(no thread has written|with no wait for its barrier)",
    ("exchange", "missing expect"): r"deadlock: 256 threads|deadlock: 128 threads wait at a barrier in shared memory",
    ("exchange", "wrong parity"): r"(no thread has written|no wait for its barrier|deadlock)",
    ("exchange", "missing cluster barrier"): r"(memory that was not initialised|with no cluster barrier since it was)",
    ("exchange", "a block that left"): r"(it stores into block 3 of its cluster, which has left the kernel|deadlock)",
}
SELFTESTS = native.emulator_selftests()
ORDERS = [0, 1, 2, 3]


@pytest.fixture(params=ORDERS, ids=lambda seed: f"order{seed}")
def order(request):
    native.emulator_order(request.param)
    yield request.param
    native.emulator_order(0)


def test_every_planted_bug_has_its_report():
    assert {test for test in SELFTESTS if test[1]} == set(REPORTS)
    # and each kernel with a bug exists without one
    assert {name for name, _ in REPORTS} < {name for name, bug in SELFTESTS if not bug}


@pytest.mark.parametrize("name", [name for name, bug in SELFTESTS if not bug])
def test_right_kernels_run(order, name):
    native.emulator_selftest(name, "")


@pytest.mark.parametrize(("name", "bug"), REPORTS, ids=["-".join(test).replace(" ", "_") for test in REPORTS])
def test_planted_bugs_are_reported(order, name, bug):
    with pytest.raises(RuntimeError) as caught:
        native.emulator_selftest(name, bug)
    assert re.search(REPORTS[name, bug], str(caught.value)), str(caught.value)
    # a launch that ended with a report leaves nothing behind
    native.emulator_selftest(name, "")


def test_a_write_after_reads_is_a_race():
    """In the natural order each thread writes what the one before has read."""
    with pytest.raises(RuntimeError, match=r"it writes byte 4 of .*which thread 0 or another reads at line"):
        native.emulator_selftest("rotate", "missing barrier before reuse")


def test_reports_repeat():
    """One seed, one order: the same sentence each time."""
    reports = set()
    for _ in range(3):
        native.emulator_order(7)
        with pytest.raises(RuntimeError) as caught:
            native.emulator_selftest("reverse", "race")
        reports.add(str(caught.value))
    native.emulator_order(0)
    assert len(reports) == 1
