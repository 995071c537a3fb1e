"""PAR (Wang et al., 2024, arXiv:2412.15119): LlamaGen whose regions of a grid grow in parallel."""

from vistok.generators.llamagen import LlamaGen
from vistok.models import register_to_config
from vistok.tokens import TokenSpec


class PAR(LlamaGen):
    """Args:
    spec: tokens to model; ids of a grid or video.
    class_names: names of the classes, in the order of their labels.
    regions: number of regions decoded at once; a square whose root divides the grid's sides.
    transformer: as of `LlamaGen`, without `order`.

    The published models have LlamaGen's sizes L, XL, XXL and 3B, with 4 or 16 regions of 24x24
    tokens.
    """

    settled = ("order",)

    @register_to_config
    def __init__(self, spec: TokenSpec, class_names: list[str], regions: int = 4, **transformer):
        super().__init__(spec, class_names, order=f"par({regions})", **transformer)
