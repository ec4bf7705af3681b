"""The hidden states of an encoder of transformers as tokens, in whichever shape its type gives them.

Shapes: B images, T tokens with class token and registers, N patches row by row, D channels, [h, w] the grid.
"""

# Facts.hidden_states -> what the states are, in order
KINDS = {
    "tokens": "[B, T, D]: the embeddings, then each block; the last without the final norm",
    "normed": "[B, T, D]: the embeddings, then each block; the last with the final norm, where there is one",
    "grids": "[B, h, w, D]: the embeddings, then each block; no final norm",
    "maps": "[B, D, h, w]: the stem, then each stage; no final norm",
    "stages": "[B, D, h, w]: each stage",
    "before_merging": "[B, D, h, w]: the embeddings, then each stage before its patches are merged for the next",
    "rerolled": "[B, h, w, D]: the embeddings, then each stage, its windows put back in their places",
}
CHANNELS_FIRST = ("maps", "stages", "before_merging")


def hidden_states(encoder, kind: str, inputs: dict) -> list:
    """All hidden states of the stock model, those of block or stage i at i; 0 is what is before the first.

    Args:
        encoder: a model of transformers.
        kind: of `KINDS`.
        inputs: arguments of its forward.
    """
    if kind == "before_merging":
        # a stage's own map is an argument of the encoder's forward that not every type's model hands on
        embeddings, grid = encoder.embeddings(**inputs)
        found = encoder.encoder(
            embeddings, grid, output_hidden_states=True, output_hidden_states_before_downsampling=True
        )
        return list(found.reshaped_hidden_states)
    found = encoder(**inputs, output_hidden_states=True)
    if kind == "rerolled":
        return list(found.reshaped_hidden_states)
    return [None] * (kind == "stages") + list(found.hidden_states)


def as_tokens(state, kind: str):
    """A hidden state -> [B, T, D]; a map's tokens row by row."""
    if kind in CHANNELS_FIRST:
        return state.flatten(2).transpose(1, 2)
    return state.flatten(1, 2) if kind in ("grids", "rerolled") else state
