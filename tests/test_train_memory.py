import mmap

from deltanet_ref.train import memory

SIZE = 96 << 20


def touch(size):
    """Make memory resident and return it to the system at once, which malloc may be told not to do."""
    with mmap.mmap(-1, size) as memory_map:
        for page in range(0, size, mmap.PAGESIZE):
            memory_map[page] = 1


def test_peak_counts_what_was_resident_and_is_freed_again():
    before = memory.peak_memory()
    assert memory.start_phase() >= before > 1e6
    touch(SIZE)
    assert memory.peak_memory() > SIZE


def test_a_phase_forgets_the_peak_of_the_one_before_where_the_system_can():
    touch(SIZE)
    peak = memory.start_phase()
    assert (memory.peak_memory() < peak - SIZE // 2) == memory.CLEAR_REFS.exists()


def test_without_the_files_of_linux_the_peak_is_that_of_the_process(monkeypatch, tmp_path):
    touch(SIZE)
    peak = memory.peak_memory()
    for name in ("STATUS", "CLEAR_REFS"):
        monkeypatch.setattr(memory, name, tmp_path / "none" / name)
    whole = memory.start_phase()
    assert whole == memory.peak_memory() >= 0.99 * peak  # both count pages, at different moments
