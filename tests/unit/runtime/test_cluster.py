"""cluster/gpu.yaml keeps its promises: what Ray accepts, what is exposed, what survives a lost node."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cast_ray.runtime.placement import ON_DEMAND, on_demand_share
from cast_ray.runtime.ray_internals import NODE_GROUP_LABEL

CLUSTER = Path(__file__).parents[3] / "cluster"


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "gpu.yaml").read_text())


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    filled = prepare_config(copy.deepcopy(config))
    filled.setdefault("cluster_synced_files", [])
    validate_config(filled)
    return filled


def environment(config: dict[str, Any]) -> dict[str, str]:
    pairs = [o.removeprefix("--env ").split("=", 1) for o in config["docker"]["run_options"] if o.startswith("--env ")]
    return {name: value for name, value in pairs}


def test_ray_accepts_the_file(written: dict[str, Any]) -> None:
    config = prepared(written)
    assert set(config["available_node_types"]) == {"head", "drivers", "gpu_a10g", "gpu_l4"}


@pytest.mark.parametrize("where", ["top", "docker", "node type"])
def test_ray_refuses_an_unknown_key(written: dict[str, Any], where: str) -> None:
    broken = copy.deepcopy(written)
    place = {"top": broken, "docker": broken["docker"], "node type": broken["available_node_types"]["gpu_l4"]}[where]
    place["max_wrokers"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        prepared(broken)


def test_no_node_installs_another_ray_at_start(written: dict[str, Any]) -> None:
    config = prepared(written)
    commands = config["setup_commands"] + config["head_setup_commands"] + config["worker_setup_commands"]
    assert not [c for c in commands if "install" in c]


def test_head_is_on_demand_and_runs_no_work(written: dict[str, Any]) -> None:
    head = prepared(written)["available_node_types"][written["head_node_type"]]
    assert head["resources"] == {"CPU": 0, ON_DEMAND: 1000}  # from the first second on, and no row's driver fits there
    assert "InstanceMarketOptions" not in head["node_config"]


def test_drivers_run_on_an_on_demand_cpu_node(written: dict[str, Any]) -> None:
    types = prepared(written)["available_node_types"]
    drivers = types["drivers"]
    assert drivers["resources"]["CPU"] > 0 and "GPU" not in drivers["resources"]
    assert on_demand_share(drivers["resources"]) and not any(
        on_demand_share(t["resources"]) for t in types.values() if "GPU" in t["resources"]
    )
    assert drivers["min_workers"] == 1
    assert "InstanceMarketOptions" not in drivers["node_config"]


def test_gpu_nodes_are_spot_and_scale_from_zero(written: dict[str, Any]) -> None:
    types = prepared(written)["available_node_types"]
    gpu = {name: t for name, t in types.items() if "GPU" in t["resources"]}
    assert len(gpu) >= 2
    for node in gpu.values():
        assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert re.match(r"g[56]\.", node["node_config"]["InstanceType"])
        assert node["min_workers"] == 0 < node["max_workers"]


def test_all_workers_may_use_the_bucket(written: dict[str, Any]) -> None:
    for name, node in written["available_node_types"].items():
        if name != written["head_node_type"]:
            assert node["node_config"]["IamInstanceProfile"]["Arn"].startswith("arn:aws:iam::")


def test_results_go_to_s3_and_train_state_is_tracked(written: dict[str, Any]) -> None:
    env = environment(written)
    assert env["CAST_RAY_STORAGE"].startswith("s3://")
    assert env["RAY_TRAIN_ENABLE_STATE_TRACKING"] == "1"


def test_token_auth_is_on_and_the_token_is_mounted(written: dict[str, Any]) -> None:
    config = prepared(written)
    assert environment(config)["RAY_AUTH_MODE"] == "token"
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_every_node_is_in_the_users_own_security_group(written: dict[str, Any]) -> None:
    # The group that Ray makes otherwise lets SSH in from everywhere, whatever `provider.security_group` adds.
    groups = [node["node_config"]["SecurityGroupIds"] for node in written["available_node_types"].values()]
    assert all(group == groups[0] and len(group) == 1 for group in groups)


def test_dashboard_listens_on_localhost_only(written: dict[str, Any]) -> None:
    (start,) = [c for c in prepared(written)["head_start_ray_commands"] if "ray start" in c]
    assert "--dashboard-host=127.0.0.1" in start
    assert "0.0.0.0" not in start


def test_idle_timeout_outlasts_an_image_pull(written: dict[str, Any]) -> None:
    assert written["idle_timeout_minutes"] >= 15


def test_image_is_built_on_the_pinned_ray(written: dict[str, Any]) -> None:
    pins = dict(
        line.split("==") for line in (CLUSTER.parent / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert f"FROM rayproject/ray:{pins['ray']}-" in (CLUSTER / "Dockerfile").read_text()
    assert f"ray[default]=={pins['ray']}" in (CLUSTER / "README.md").read_text()


def test_every_node_is_labelled_with_its_type(written: dict[str, Any]) -> None:
    types = prepared(written)["available_node_types"]
    assert {name: node["labels"] for name, node in types.items()} == {name: {NODE_GROUP_LABEL: name} for name in types}
