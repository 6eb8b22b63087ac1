"""Settings of the whole process."""

from cnnops import _C


class Settings:
    """What can be set for the whole process; ``cnnops.settings`` is the one instance."""

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
    def accurate(self) -> bool:
        """Whether ``algorithm="auto"`` means ``"accurate"``: the fastest algorithm whose rounding error is at most 1.5
        times that of ``"direct"``. False, unless set here or by the environment variable CNNOPS_ACCURATE=1.

        It is read when a convolution runs, also in a graph that torch.compile made before.
        """
        return _C.accurate()

    @accurate.setter
    def accurate(self, on: bool) -> None:
        _C.set_accurate(on)

    def __repr__(self) -> str:
        return f"Settings(instruction_set={self.instruction_set!r}, accurate={self.accurate})"


settings = Settings()
