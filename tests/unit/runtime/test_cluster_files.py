"""The cluster files beside gpu.yaml: fields that KubeRay, Ray and SkyPilot know, and a token for every request in all.

KubeRay's schema is in no package of the Python or npm registries. The fields of its own types are listed below, as in
its release 1.5.1 (ray-operator/apis/ray/v1); those of Kubernetes' pods that the files use, too. Where they are at hand,
the published schemas are used as well: KubeRay's own by CAST_RAY_KUBERAY_CRDS (its folder
helm-chart/kuberay-operator/crds), that of pods by the package kubernetes-validate, SkyPilot's by skypilot.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cast_ray.runtime.placement import ON_DEMAND

CLUSTER = Path(__file__).parents[3] / "cluster"


def one_of(**properties: Any) -> dict[str, Any]:
    """Schema of a mapping with these fields and no other; a name that ends with an underscore must be there."""
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {name.removesuffix("_"): schema for name, schema in properties.items()},
        "required": [name.removesuffix("_") for name in properties if name.endswith("_")],
    }


TEXT, WHOLE, YES_OR_NO = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
"""Kubernetes takes no number for a label, a resource or a variable, and neither does KubeRay for rayStartParams."""
VARIABLE = one_of(name_=TEXT, value_=TEXT)
CONTAINER = one_of(
    name_=TEXT,
    image_=TEXT,
    env={"type": "array", "items": VARIABLE},
    resources_=one_of(requests_=TEXTS, limits_=TEXTS),
)
TOLERATION = one_of(key_=TEXT, operator_={"enum": ["Exists", "Equal"]}, effect_={"enum": ["NoSchedule"]}, value=TEXT)
POD = one_of(
    spec_=one_of(
        restartPolicy_={"enum": ["Never"]},
        serviceAccountName=TEXT,
        nodeSelector=TEXTS,
        tolerations={"type": "array", "items": TOLERATION},
        terminationGracePeriodSeconds=WHOLE,
        containers_={"type": "array", "items": CONTAINER, "minItems": 1, "maxItems": 1},
    )
)
GROUP = one_of(
    groupName_={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
    replicas=WHOLE,
    minReplicas_=WHOLE,
    maxReplicas_=WHOLE,
    rayStartParams_=TEXTS,
    template_=POD,
)
CLUSTER_SPEC = one_of(
    rayVersion_=TEXT,
    authOptions_=one_of(mode_={"const": "token"}),
    enableInTreeAutoscaling_={"const": True},
    autoscalerOptions=one_of(
        version={"enum": ["v1", "v2"]},
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        idleTimeoutSeconds=WHOLE,
    ),
    headGroupSpec_=one_of(rayStartParams_=TEXTS, template_=POD),
    workerGroupSpecs_={"type": "array", "items": GROUP},
)
JOB_SPEC = one_of(
    entrypoint_=TEXT,
    runtimeEnvYAML=TEXT,
    shutdownAfterJobFinishes=YES_OR_NO,
    ttlSecondsAfterFinished=WHOLE,
    backoffLimit=WHOLE,
    rayClusterSpec_=CLUSTER_SPEC,
)


def whole(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return one_of(apiVersion_={"const": "ray.io/v1"}, kind_={"const": kind}, metadata_=one_of(name_=TEXT), spec_=spec)


SCHEMAS = {
    "kuberay/raycluster.yaml": whole("RayCluster", CLUSTER_SPEC),
    "kuberay/rayjob.yaml": whole("RayJob", JOB_SPEC),
    "skypilot.yaml": one_of(
        name_=TEXT,
        num_nodes=WHOLE,
        resources_=one_of(
            accelerators={"type": "object", "additionalProperties": WHOLE}, cpus=TEXT, use_spot=YES_OR_NO
        ),
        workdir=TEXT,
        envs=TEXTS,
        secrets={"type": "object", "additionalProperties": {"type": "null"}},
        setup=TEXT,
        run_=TEXT,
    ),
}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def cluster_specs() -> list[dict[str, Any]]:
    return [read("kuberay/raycluster.yaml")["spec"], read("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]]


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_every_field_is_one_that_the_reader_of_the_file_knows(name: str) -> None:
    jsonschema.Draft202012Validator(SCHEMAS[name]).validate(read(name))


@pytest.mark.parametrize("name", ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"])
def test_kuberays_published_schema_knows_every_field(name: str) -> None:
    folder = os.environ.get("CAST_RAY_KUBERAY_CRDS")
    if folder is None:
        pytest.skip("name the folder of KubeRay's custom resource definitions by CAST_RAY_KUBERAY_CRDS")
    document = read(name)
    definition = yaml.safe_load((Path(folder) / f"ray.io_{document['kind'].lower()}s.yaml").read_text())
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    jsonschema.Draft202012Validator(closed(version["schema"]["openAPIV3Schema"])).validate(document)


def closed(schema: Any) -> Any:
    """A schema that refuses unknown fields: `kubectl apply` warns of them, and the operator then never sees them."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        made.setdefault("additionalProperties", False)
    return made


@pytest.mark.parametrize("spec", cluster_specs(), ids=["cluster", "job"])
def test_kubernetes_published_schema_knows_every_field_of_the_pods(spec: dict[str, Any]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.33", strict=True)
        pod["spec"] = pod["spec"] | {"nodeSelectors": {}}
        with pytest.raises(kubernetes_validate.ValidationError, match="nodeSelectors"):
            kubernetes_validate.validate(pod, "1.33", strict=True)


def test_a_misspelt_field_is_found() -> None:
    broken = read("kuberay/raycluster.yaml")
    broken["spec"]["workerGroupSpecs"][1]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(broken, SCHEMAS["kuberay/raycluster.yaml"])


def test_a_job_starts_the_same_cluster() -> None:
    cluster, job = cluster_specs()
    assert job == cluster


def test_versions_are_those_of_the_package() -> None:
    pins = (CLUSTER.parent / "constraints.txt").read_text()
    (pinned,) = re.findall(r"^ray==(.*)$", pins, re.MULTILINE)
    assert [spec["rayVersion"] for spec in cluster_specs()] == [pinned] * 2


@pytest.mark.parametrize("spec", cluster_specs(), ids=["cluster", "job"])
def test_the_pods_are_laid_out_as_the_nodes_of_gpu_yaml(spec: dict[str, Any]) -> None:
    head, (drivers, gpu) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert head["rayStartParams"] == {"num-cpus": "0"} | drivers["rayStartParams"]
    # As KubeRay writes it into the command line of `ray start`: a JSON text in quotes of the shell's.
    assert json.loads(json.loads(drivers["rayStartParams"]["resources"])) == {ON_DEMAND: 1000}
    assert gpu["rayStartParams"] == {}
    assert drivers["minReplicas"] == 1 and gpu["minReplicas"] == 0 < gpu["maxReplicas"]
    assert drivers["template"]["spec"]["nodeSelector"] != gpu["template"]["spec"]["nodeSelector"]
    for group in (head, drivers, gpu):
        (container,) = group["template"]["spec"]["containers"]
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        assert variables["CAST_RAY_STORAGE"].startswith("s3://")
        assert variables["RAY_TRAIN_ENABLE_STATE_TRACKING"] == "1"
        # A limit above the request would let Ray count CPUs that the pod is not given.
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (group is gpu)


def onprem() -> dict[str, Any]:
    filled = prepare_config(copy.deepcopy(read("onprem.yaml")))
    filled.setdefault("cluster_synced_files", [])
    validate_config(filled)
    return filled


def test_ray_accepts_the_file_for_machines_of_ones_own() -> None:
    config = onprem()
    (node_type,) = config["available_node_types"].values()
    assert config["provider"]["type"] == "local" and node_type["min_workers"] == len(config["provider"]["worker_ips"])
    (start,) = [c for c in config["head_start_ray_commands"] if "ray start" in c]
    assert "--num-cpus=0" in start and "--dashboard-host=127.0.0.1" in start


def test_every_process_of_every_cluster_asks_for_the_token() -> None:
    config = onprem()
    # Every shell of Ray reads ~/.bashrc, which reads this file.
    setup = config["setup_commands"]
    assert any(re.match(r"echo 'export RAY_AUTH_MODE=token .*>> ~/.cast_ray.sh$", command) for command in setup)
    assert "cast_ray.sh" in setup[-1] and setup[-1].endswith(">> ~/.bashrc")
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert all(spec["authOptions"] == {"mode": "token"} for spec in cluster_specs())
    sky = read("skypilot.yaml")
    assert sky["envs"]["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" in sky["secrets"]
    slurm = (CLUSTER / "slurm.sbatch").read_text()
    assert slurm.index("export RAY_AUTH_MODE=token") < slurm.index("ray symmetric-run --address")


def test_skypilot_accepts_its_file() -> None:
    schemas = pytest.importorskip("sky.utils.schemas")
    check = pytest.importorskip("sky.utils.common_utils").validate_schema
    file = read("skypilot.yaml")
    check(file, schemas.get_task_schema(), "task: ")
    check(file["resources"], schemas.get_resources_schema(), "resources: ")
    with pytest.raises(ValueError, match="num_nodes"):
        check(file | {"num_node": 2}, schemas.get_task_schema(), "task: ")


@pytest.mark.parametrize("script", ["setup", "run"])
def test_scripts_of_skypilot_are_shell(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=read("skypilot.yaml")[script], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_skypilots_own_ray_is_left_alone() -> None:
    run = read("skypilot.yaml")["run"]
    ports = set(re.findall(r"port (\d+)|:(\d{4})", run))
    assert "ray stop" not in run and not {"6380", "8266"} & {port for pair in ports for port in pair}


def test_no_dashboard_is_opened_to_the_network() -> None:
    for path in CLUSTER.rglob("*"):
        if path.is_file() and path.suffix in (".yaml", ".sbatch"):
            assert not re.search(r"0\.0\.0\.0|LoadBalancer|NodePort|[iI]ngress", path.read_text()), path
