"""What a plan may ask of the layers of a vision encoder: the fields of a `LayerPlan`, where they mean something there.

Patches are the visual tokens; global tokens (a class token) take the text's part: every patch reads them, they read
every patch of the active heads, and they use all heads and the whole FFN. Attention is within one image, frame, or
window of the model's own, in both directions.
"""

from __future__ import annotations

from .layer_plan import LayerPlan, Neighborhood, PlanError, brief


def check_tower_layer(layer: LayerPlan) -> None:
    """Raise PlanError naming the field for what means nothing in a vision encoder."""
    if layer == LayerPlan.off():
        return
    if not layer.text_reads:
        raise PlanError("text_reads: got false, expected true, or 'off' for the whole layer (no text is in a tower)")
    if isinstance(layer.attention, Neighborhood):
        if layer.attention.direction != "both":
            raise PlanError(
                f"attention: direction: got {brief(layer.attention.direction)}, expected both (patches have no order)"
            )
        if layer.attention.frames:
            raise PlanError(
                f"attention: frames: got {layer.attention.frames}, expected 0 (a tower attends within frames)"
            )
    if layer.tokens and layer.tokens.by == "attention":
        raise PlanError(
            "tokens.by: got attention, expected norm, uniform, stride or random (no text row is in a tower to rank by)"
        )
