"""Reads the champion's version, writes to a running service: the rollout, or a recorded no-op without an address."""

from __future__ import annotations


def release(serve_address: str, model: str) -> str:
    """Roll ``model`` (models:/NAME/VERSION) out to the service at the Ray dashboard address; say what was done."""
    if not serve_address:
        return "no service address (CCA_SERVE_ADDRESS): not rolled out"
    from deploy.release import set_model  # brings the serving stack along, which a run without a service never needs

    set_model(serve_address, model)
    return f"{model} rolled out to {serve_address}"
