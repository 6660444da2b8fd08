"""Shape of an M2-class model, what it costs to store, and what it costs to train."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of the model. Defaults are MiniMax-M2's own (see the released config.json).

    Raises:
        ValueError: on construction, naming the field, its value and the nearest legal one.
    """

    vocab_size: int = 200_064
    hidden_size: int = 3072
    num_hidden_layers: int = 62
    num_attention_heads: int = 48
    num_key_value_heads: int = 8
    head_dim: int = 128
    rotary_dim: int = 64
    rope_theta: float = 5e6
    max_position_embeddings: int = 196_608
    num_experts: int = 256
    top_k: int = 8
    intermediate_size: int = 1536
    rms_norm_eps: float = 1e-6
    num_mtp_modules: int = 0
    router_aux_loss_coef: float = 0.0
    initializer_range: float = 0.02
    fp32_head: bool = False  # the head in fp32 throughout; without it logits of generation are rounded to the weights' dtype
    fp8_experts: bool = False  # products of the experts and their gradients in blockwise FP8; needs bf16 weights and even widths
    fp8_dense: bool = False  # the same of the attention's projections, where TransformerEngine is importable on a GPU

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and f.name != "num_mtp_modules" and value < 1:
                raise ValueError(f"model.{f.name} = {value}: must be at least 1")
        if self.num_mtp_modules < 0:
            raise ValueError(f"model.num_mtp_modules = {self.num_mtp_modules}: must be at least 0")
        if self.num_attention_heads % self.num_key_value_heads:
            nearest = min((d for d in range(1, self.num_attention_heads + 1) if self.num_attention_heads % d == 0),
                          key=lambda d: abs(d - self.num_key_value_heads))
            raise ValueError(f"model.num_key_value_heads = {self.num_key_value_heads}: must divide num_attention_heads = "
                             f"{self.num_attention_heads}; nearest is {nearest}")
        if self.top_k > self.num_experts:
            raise ValueError(f"model.top_k = {self.top_k}: more than num_experts = {self.num_experts}; at most {self.num_experts}")
        for name in ("hidden_size", "intermediate_size"):
            width = getattr(self, name)
            if self.fp8_experts and width % 2:
                raise ValueError(f"model.{name} = {width}: must be even with fp8_experts; nearest is {width + 1}")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"model.rotary_dim = {self.rotary_dim}: must be even and at most head_dim = {self.head_dim}; "
                             f"nearest is {min(self.rotary_dim + self.rotary_dim % 2, self.head_dim - self.head_dim % 2)}")

    @property
    def q_size(self) -> int:
        """Width of the concatenated query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the concatenated key (or value) heads."""
        return self.num_key_value_heads * self.head_dim

    # ---- parameters -----------------------------------------------------------------------------------------------------------

    @property
    def expert_parameters(self) -> int:
        """Of one expert: gate, up and down."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def attention_parameters(self) -> int:
        """Of one layer: four projections and the norms of q and k."""
        return 2 * self.hidden_size * (self.q_size + self.kv_size) + self.q_size + self.kv_size

    def layer_parameters(self, experts: int) -> int:
        """Of one decoder layer with ``experts`` of its experts counted; the router's bias is counted though it gets no gradient."""
        router = self.num_experts * (self.hidden_size + 1)
        return self.attention_parameters + 2 * self.hidden_size + router + experts * self.expert_parameters

    @property
    def mtp_parameters(self) -> int:
        """Of one multi-token-prediction module: projection of [embedding; hidden], three norms, one layer."""
        return 2 * self.hidden_size**2 + 3 * self.hidden_size + self.layer_parameters(self.num_experts)

    def num_parameters(self) -> int:
        """All weights, MTP modules included, router biases included.

        The released M2 (no MTP weights) has 228,689,764,864. The report's 229.9B is this plus two more vocabulary matrices
        (2 * 200,064 * 3,072 = 1,229,193,216, together 229,918,958,080): it seems to count an embedding and a head of the MTP
        modules, which share the main model's here as in DeepSeek-V3.
        """
        vocabulary = 2 * self.vocab_size * self.hidden_size
        layers = self.num_hidden_layers * self.layer_parameters(self.num_experts)
        return layers + vocabulary + self.hidden_size + self.num_mtp_modules * self.mtp_parameters

    def num_active_parameters(self) -> int:
        """Weights of the layers and the final norm that one token uses, no embedding, head or MTP: M2's "9.8B" is 9,801,359,872."""
        return self.num_hidden_layers * self.layer_parameters(self.top_k) + self.hidden_size

    # ---- arithmetic -----------------------------------------------------------------------------------------------------------

    def forward_flops(self, tokens: int, visible_pairs: int, predicted: int, mtp_tokens: int = 0) -> int:
        """Multiply-adds counted twice, matrix products only: the model FLOPs of one forward. A training step costs three times it.

        Args:
            tokens: T of the forest.
            visible_pairs: (query, key) pairs that the forest's mask leaves, self included; ``sum(depth + 1)``.
            predicted: tokens whose logits are computed, over the main head and all MTP heads.
            mtp_tokens: tokens that pass through MTP layers, summed over modules; their pairs are counted as the main layers' average.
        """
        projections = 2 * self.hidden_size * (self.q_size + self.kv_size)
        linear = projections + self.num_experts * self.hidden_size + self.top_k * self.expert_parameters
        pairs_cost = 2 * 2 * self.q_size
        layers = 2 * linear * (tokens * self.num_hidden_layers + mtp_tokens) + 4 * self.hidden_size**2 * mtp_tokens
        attention = pairs_cost * visible_pairs * self.num_hidden_layers + pairs_cost * visible_pairs * mtp_tokens // max(tokens, 1)
        return layers + attention + 2 * self.vocab_size * self.hidden_size * predicted

    def layer_flops(self, depth: int) -> int:
        """Of the forward of one decoder layer for one token that sees ``depth`` others."""
        return self.forward_flops(1, depth + 1, 0) // self.num_hidden_layers

    def last_flops(self, depth: int) -> int:
        """Of what follows the layers, for one such token: the head, and every MTP module with its own use of the head."""
        k = self.num_mtp_modules
        return self.forward_flops(1, depth + 1, 1 + k, k) - self.forward_flops(1, depth + 1, 0)

    # ---- dictionaries ---------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The reverse of :meth:`to_dict`.

        Raises:
            ValueError: an unknown field.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"model.{unknown[0]}: unknown field; known are {', '.join(sorted(known))}")
        return cls(**values)
