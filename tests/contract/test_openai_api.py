"""What clients and clusters rely on: the Images API's requests and errors, the Serve configuration, pinned versions."""

from __future__ import annotations

import json
import pickle
from importlib.resources import files

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cca_core.config import ConfigError
from deploy.api import MAX_IMAGES, MAX_SEED, ApiError, class_index, enlargement, parse
from deploy.local import check_port
from deploy.release import ServiceConfig, serve_config
from deploy.versions import fetched, pin

DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "cfg_scale": 1.5, "cfg_interval": -1}


def body(**fields: object) -> bytes:
    return json.dumps({"prompt": "ant", **fields}).encode()


def test_a_request_overrides_the_models_sampling_only_where_it_says_so() -> None:
    assert parse(body()).sampling(DEFAULTS) == DEFAULTS
    asked = parse(body(temperature=0, top_k=0, top_p=0.0, cfg_scale=1)).sampling(DEFAULTS)
    assert asked == {"temperature": 0.0, "top_k": 0, "top_p": 0.0, "cfg_scale": 1.0, "cfg_interval": -1}


def test_seeds_without_a_wish_differ_and_leave_room_for_all_images() -> None:
    seeds = {parse(body(n=MAX_IMAGES)).seed for _ in range(20)}
    assert len(seeds) == 20
    assert max(seeds) + MAX_IMAGES - 1 <= MAX_SEED
    assert parse(body(seed=MAX_SEED)).seed == MAX_SEED


def test_a_refusal_is_openais_body_and_survives_the_way_between_processes() -> None:
    with pytest.raises(ApiError) as raised:
        parse(body(sed=1))
    error = pickle.loads(pickle.dumps(raised.value))
    assert error.status == 400
    assert error.body() == raised.value.body()
    assert error.body()["error"] | {"message": ""} == {
        "message": "",
        "type": "invalid_request_error",
        "param": "sed",
        "code": "unknown_parameter",
    }
    assert ApiError(503, "busy").body()["error"]["type"] == "server_error"


def test_a_name_wins_over_an_index() -> None:
    names = ("2", "1", "bee")
    assert [class_index(prompt, names) for prompt in ("2", "1", "bee", "0")] == [0, 1, 2, 0]
    for prompt in ("3", "-1", "Bee", "\u0661", "1" * 999):
        with pytest.raises(ApiError, match="this model draws 2, 1, bee"):
            class_index(prompt, names)


@pytest.mark.parametrize(("size", "factor"), [("auto", 1), ("16x16", 1), ("64x64", 4), ("1024x1024", 64)])
def test_sizes_are_whole_multiples(size: str, factor: int) -> None:
    assert enlargement(size, 16) == factor


@pytest.mark.parametrize("size", ["", "16", "16x", "x16", "16x32", "0x0", "24x24", "016x016", "2048x2048", "-16x-16"])
def test_other_sizes_are_refused(size: str) -> None:
    with pytest.raises(ApiError, match="use auto, 16x16"):
        enlargement(size, 16)


def test_a_model_larger_than_the_limit_has_its_own_size() -> None:
    assert enlargement("1536x1536", 1536) == 1


def test_the_serve_configuration_is_valid_and_pins_a_version() -> None:
    config = yaml.safe_load((files("deploy") / "serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    generator = next(one for one in application.deployments if one.name == "Generator")
    assert generator.autoscaling_config["max_replicas"] > generator.autoscaling_config["min_replicas"]
    assert (
        generator.max_queued_requests
        < next(d for d in application.deployments if d is not generator).max_ongoing_requests
    )
    three = ServiceConfig(tracking_uri="", max_replicas=3)
    for made in (config, serve_config("models:/a/7", three, cpus_per_replica=2)):
        ServeDeploySchema.model_validate(made)
        (user_config,) = (d["user_config"] for d in made["applications"][0]["deployments"] if d["name"] == "Generator")
        assert "@" not in user_config["model"]


def test_a_replica_follows_no_alias() -> None:
    with pytest.raises(ConfigError, match="may change its meaning"), fetched("models:/a@champion", ""):
        pass


@pytest.mark.parametrize("model", ["models:/a", "models:/a@", "models:/a/latest", "models:/a/1@b", "models:/a'b/1"])
def test_what_names_no_model_is_said(model: str) -> None:
    with pytest.raises(ConfigError, match="names no model: use models:/NAME@champion"):
        pin(model, "sqlite:///nowhere.db")


def test_a_bundle_that_is_not_there_is_said(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no bundle at"):
        pin(str(tmp_path), "")


@pytest.mark.parametrize("port", [0, 65536, 99999, -1])
def test_a_number_that_is_no_port_is_said(port: int) -> None:
    with pytest.raises(ConfigError, match="choose one from 1 to 65535"):
        check_port("127.0.0.1", port)
