"""What generators share that predict whole scales (VAR: Tian et al., 2024, arXiv:2404.02905;
TokenFlow: Qu et al., 2024, arXiv:2412.03069): they are fed not tokens but what these stand for."""

from copy import deepcopy

import torch
from torch import nn

from vistok.decoding.orders import Order
from vistok.decoding.plans import Plan
from vistok.errors import IncompatibleTokensError, UserError
from vistok.generators.base import Generator
from vistok.quantizers.multi_scale import MultiScale
from vistok.tokens import require_same


class NextScale(Generator):
    """A generator of scales that keeps the `codes` of its tokenizer, a `MultiScale`, frozen, in its
    own config and weights. A subclass says through which layers they come in (`code_layers`)."""

    of_scales = True
    code_embed: nn.Module

    def __init__(self):
        super().__init__()
        self.codes: MultiScale | None = None

    def take_codes(self, tokenizer: object) -> None:
        """Keep a copy of the tokenizer's quantizer; raise `IncompatibleTokensError` unless it is a
        `MultiScale` of these tokens."""
        codes = getattr(tokenizer, "quantizer", None)
        if not isinstance(codes, MultiScale):
            raise IncompatibleTokensError(
                f"{type(self).__name__} is fed the sums of the scales, which "
                f"{type(tokenizer).__name__} does not make: choose a tokenizer whose quantizer is "
                "MultiScale"
            )
        self.adopt(codes)
        self.register_to_config(codes=codes)

    def adopt(self, codes: MultiScale) -> None:
        """Be fed by a frozen copy of these codes from now on."""
        made = codes.spec(self.spec.shape[-1])
        require_same("the quantizer", made, type(self).__name__, self.spec)
        if self.codes is None or self.codes.dim != codes.dim:
            self.code_embed = self.code_layers(codes.dim).to(self.device, self.dtype)
        self.codes = deepcopy(codes).requires_grad_(False).to(self.device)

    def start_from(self, other: Generator) -> None:
        """Take over all weights but the codes, which are the tokenizer's."""
        rest = {k: v for k, v in other.state_dict().items() if not k.startswith("codes.")}
        own = {f"codes.{k}": v for k, v in self.known_codes.state_dict().items()}
        self.take_over(rest | own, type(other).__name__)

    def code_layers(self, dim: int) -> nn.Module:
        """Return fresh layers from the `dim` channels of codes to the width of the rows."""
        raise NotImplementedError

    @property
    def known_codes(self) -> MultiScale:
        """The codes; raises `UserError` for a model that was given none."""
        if self.codes is None:
            raise UserError(
                f"{type(self).__name__} knows no codes: give it those of its tokenizer "
                "(take_codes) before anything else"
            )
        return self.codes

    def plan(self, order: Order | None = None) -> Plan:
        order = order or Order("next_scale")
        if order.name != "next_scale":
            raise self.refusal(order)
        return order(self.spec.shape)

    @property
    def orders(self) -> list[str]:
        return ["next_scale", "next_scale(corrections)"]

    def compile_decoding(self, **options) -> None:
        # Scales differ in size, and the null half comes and goes: one graph serves them all.
        self.transformer = torch.compile(self.transformer, dynamic=True, **options)
