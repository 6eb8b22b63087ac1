"""Settings of the whole process."""

from cnnops import _C


class Settings:
    """What can be set for the whole process; ``cnnops.settings`` is the one instance."""

    __slots__ = ()  # a misspelt name is an error

    @property
    def instruction_sets(self) -> list[str]:
        """The instruction sets of this build that the processor runs, widest first."""
        return _C.instruction_sets()

    @property
    def instruction_set(self) -> str:
        """The one that CPU kernels use: the widest, unless set here or by the environment variable CNNOPS_ISA.

        Results are the same bits from call to call with one instruction set; another may round differently. Setting an
        unknown or unsupported name raises ValueError.
        """
        return _C.instruction_set()

    @instruction_set.setter
    def instruction_set(self, name: str) -> None:
        _C.set_instruction_set(name)

    @property
    def cache_limit(self) -> int:
        """How many bytes of freed memory are kept at most for the next tensors, on the CPU; 0 keeps none.

        The environment variable CNNOPS_CACHE_LIMIT sets it from the start. Otherwise it is an eighth of the memory that
        the process may use (the machine's, its container's or ulimit's), 4 GiB at most, and 0 under a sanitizer.
        Setting it to less gives back what is too much at once. A tensor larger than the limit is never kept.
        """
        return _C.memory_stats()["limit"]

    @cache_limit.setter
    def cache_limit(self, size: int) -> None:
        _C.set_cache_limit(size)

    @property
    def accurate(self) -> bool:
        """Whether ``algorithm="auto"`` means ``"accurate"``: the fastest of the algorithms that round about as
        ``"direct"`` does (on every layer of docs/accuracy.md at most 1.5 times its error). False, unless set here or by
        the environment variable CNNOPS_ACCURATE=1.

        It is read when a convolution runs, also in a graph that torch.compile made before.
        """
        return _C.accurate()

    @accurate.setter
    def accurate(self, on: bool) -> None:
        _C.set_accurate(on)

    def __repr__(self) -> str:
        names = "instruction_set", "accurate", "cache_limit"
        return f"Settings({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


settings = Settings()
