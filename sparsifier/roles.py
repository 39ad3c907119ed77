"""Lists the roles of matrices in a decoder block, and the names that model families give them."""

from __future__ import annotations

from resting.sparsifier.errors import UnsupportedModelError

LINEAR_ROLES = ("q", "k", "v", "o", "gate", "up", "down")
"""What the matrices of a block compute. As roles of a method, all seven stand for every matrix that has a role."""
ACT = "act"
"""The activated gate: its mask lets the rows of ``up`` and the columns of ``down`` rest together."""
NEURONS = "neurons"
"""The neurons of a gated MLP: a mask lets rows of ``gate`` and ``up`` and columns of ``down`` rest together."""

COMPUTES = {
    "qkv": ("q", "k", "v"),
    "kv": ("k", "v"),
    "q_a": ("q",),
    "q_b": ("q",),
    "kv_a": ("k", "v"),
    "gate_up": ("gate", "up"),
}
"""What matrices compute that do not compute one of `LINEAR_ROLES` alone: fused ones, and those of latents.

``kv_b`` is not here: a decode step expands the latents of all tokens in the cache by it, so that nothing of it rests.
"""

INPUT_OF = {
    "q": "attention",
    "k": "attention",
    "v": "attention",
    "qkv": "attention",
    "kv": "attention",
    "q_a": "attention",
    "kv_a": "attention",
    "q_b": "q_b",
    "kv_b": "kv_b",
    "o": "o",
    "gate": "mlp",
    "up": "mlp",
    "gate_up": "mlp",
    "down": "down",
}
"""Sites of one part of a block with the same value read the same tensor."""

ATTENTION = {
    "q": ("q_proj", "query_proj", "wq"),
    "k": ("k_proj", "key_proj", "wk"),
    "v": ("v_proj", "value_proj", "wv"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv"),
    "kv": ("kv_proj",),
    "q_a": ("q_a_proj",),
    "q_b": ("q_b_proj",),
    "kv_a": ("kv_a_proj_with_mqa",),
    "kv_b": ("kv_b_proj",),
    "o": ("o_proj", "out_proj", "wo", "dense", "c_proj"),
}
"""Names of layers in an attention module."""
MLP = {
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "fc1", "fc_in", "c_fc", "dense_h_to_4h"),
    "gate_up": ("gate_up_proj", "input_linear"),
    "down": ("down_proj", "w2", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "output_linear"),
}
"""Names of layers in an MLP."""
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token")
"""Names, in a config, of the number of experts that a token goes through."""


def is_wanted(role: str, roles: tuple[str, ...]) -> bool:
    """Tells whether `roles`, of those that methods know, cover all that a matrix with `role` computes.

    Raises
    ------
    UnsupportedModelError
        If they cover a part of it: one matrix has one rule.
    """
    covered = [of for of in computes(role) if of in roles]
    if covered and len(covered) < len(computes(role)) and role not in roles:
        raise UnsupportedModelError(
            f"this model computes {', '.join(computes(role))} by one matrix: no rule of {', '.join(covered)} alone is "
            "possible"
        )
    return role in roles or len(covered) == len(computes(role))


def computes(role: str) -> tuple[str, ...]:
    """Tells which of `LINEAR_ROLES` a matrix with `role` computes, or computes a part of."""
    return COMPUTES.get(role, (role,))
