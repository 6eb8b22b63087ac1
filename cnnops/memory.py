"""The memory of operators' results on the CPU, which is kept warm: what there is of it, and how to give it back."""

from cnnops import _C


def memory_stats() -> dict[str, int]:
    """What the cache of this process's CPU memory holds and has done, since the process began.

    A tensor that an operator of cnnops returns, and the operator's scratch memory, are *blocks* of this cache if they
    have 64 KiB or more (smaller ones are torch's, and not counted). A block's size is rounded up to whole
    pages.

    ======================  ===========================================================================
    ``bytes_in_use``        of blocks that belong to a tensor or to a thread's scratch memory
    ``bytes_in_use_peak``   the most there ever was
    ``bytes_cached``        of freed blocks that are kept for the next tensors, of any size
    ``bytes_cached_peak``   the most there ever was
    ``hits``                how many times a kept block was used again
    ``misses``              how many times there was none that fitted, and a fresh one was made
    ``evictions``           how many kept blocks went back to the system: what was beyond the limit, and what
                            was not wanted for half a minute
    ``limit``               of ``bytes_cached``; ``cnnops.settings.cache_limit`` sets it
    ======================  ===========================================================================
    """
    return _C.memory_stats()


def empty_cache() -> None:
    """Give all freed blocks that are kept back to the system. Tensors, and the memory of those to come, are as before.

    Never needed for correctness: after a peak it lowers what the process holds, at the price of fresh memory next time.
    """
    _C.empty_cache()
