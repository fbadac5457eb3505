"""Reads the champion's version, writes to a running service: the rollout, or a recorded no-op without an address."""

from __future__ import annotations


def release(serve_address: str, model: str) -> str:
    """Roll ``model`` (models:/NAME/VERSION) out to the service at the Ray dashboard address; say what was done."""
    if not serve_address:
        return "no service address (CCA_SERVE_ADDRESS): not rolled out"
    # These bring the serving stack along, which a run without a service never needs.
    from deploy.canary import end
    from deploy.release import set_model

    set_model(serve_address, model)
    end(serve_address)  # a canary that was promoted, or that is out of date now
    return f"{model} rolled out to {serve_address}"
