"""How a rule is computed: the definition in plain torch, on every token of a sequence."""
