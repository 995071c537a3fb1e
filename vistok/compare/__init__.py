"""Systems side by side: trained alike or loaded, scored by one protocol, shown in one report."""

from vistok.compare.spec import Comparison, GeneratorEntry, Row, TokenizerEntry

__all__ = ["Comparison", "GeneratorEntry", "Row", "TokenizerEntry"]
