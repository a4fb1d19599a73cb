"""The cluster files against the schemas of who reads them, and against each other. No cluster has run them."""

from __future__ import annotations

import copy
import fnmatch
import gzip
import json
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import moto
import pytest
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator
from jsonschema import ValidationError
from ray.autoscaler._private.aws import node_provider as aws
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.kuberay.utils import parse_quantity
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest
from ray.core.generated.common_pb2 import LabelSelectorOperator
from transformers import Qwen2Config
from typer.testing import CliRunner

from cluster.cli import app
from cluster.planning.head import HEAD
from cluster.planning.placement import Node, bundles, matches
from cluster.planning.plan import described_nodes, plan
from kdray.config import Config, load_config
from kdray.config.labels import ACCELERATOR_LABEL

ROOT = Path(__file__).resolve().parents[4]
MANIFESTS = ROOT / "cluster" / "manifests"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RECIPE = ROOT / "configs" / "on_cluster.yaml"

KUBERNETES = "1.35"
"""What pod templates and claims are validated against, strictly: an unknown key is an error."""

ROLES = {
    "teacher-large": (4, 8, "H100"),
    "teacher-small": (8, 4, "L40S"),
    "student": (1, 8, "A100"),
    "rollouts": (12, 0, None),
}
"""Role -> most nodes, GPUs of each, accelerator; the same on AWS and on Kubernetes."""

# Of the CRD reference of KubeRay 1.7.0 (ray-project/kuberay, docs/reference/api.md), the types that the files use, whole: field
# -> its type there. A set is an enum; a list an array; "map" is an object of strings; "pod" and "metadata" are Kubernetes' own;
# "unused" is a type that is not in this table.
KUBERAY: dict[str, dict[str, Any]] = {
    "RayCluster": {"apiVersion": {"ray.io/v1"}, "kind": {"RayCluster"}, "metadata": "metadata", "spec": "RayClusterSpec"},
    "RayJob": {"apiVersion": {"ray.io/v1"}, "kind": {"RayJob"}, "metadata": "metadata", "spec": "RayJobSpec"},
    "RayClusterSpec": {
        "upgradeStrategy": "unused",
        "authOptions": "AuthOptions",
        "suspend": bool,
        "managedBy": str,
        "autoscalerOptions": "AutoscalerOptions",
        "headServiceAnnotations": "map",
        "enableInTreeAutoscaling": bool,
        "gcsFaultToleranceOptions": "unused",
        "historyServerOptions": "unused",
        "networkPolicy": "unused",
        "tlsOptions": "unused",
        "headGroupSpec": "HeadGroupSpec",
        "rayVersion": str,
        "workerGroupSpecs": ["WorkerGroupSpec"],
    },
    "AuthOptions": {"enableK8sTokenAuth": bool, "secretName": str, "mode": {"disabled", "token"}},
    "AutoscalerOptions": {
        "resources": "unused",
        "image": str,
        "imagePullPolicy": str,
        "securityContext": "pod",
        "idleTimeoutSeconds": int,
        "upscalingMode": {"Default", "Aggressive", "Conservative"},
        "version": {"v1", "v2"},
        "env": "unused",
        "envFrom": "unused",
        "volumeMounts": "unused",
        "command": [str],
        "args": [str],
    },
    "HeadGroupSpec": {
        "template": "pod",
        "headService": "unused",
        "enableIngress": bool,
        "resources": "map",
        "labels": "map",
        "rayStartParams": "map",
        "serviceType": str,
    },
    "WorkerGroupSpec": {
        "suspend": bool,
        "groupName": str,
        "replicas": int,
        "minReplicas": int,
        "maxReplicas": int,
        "idleTimeoutSeconds": int,
        "priority": int,
        "resources": "map",
        "labels": "map",
        "rayStartParams": "map",
        "template": "pod",
        "scaleStrategy": "unused",
        "numOfHosts": int,
    },
    "RayJobSpec": {
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "rayClusterSpec": "RayClusterSpec",
        "submitterPodTemplate": "pod",
        "metadata": "map",
        "clusterSelector": "map",
        "submitterConfig": "unused",
        "managedBy": str,
        "deletionStrategy": "unused",
        "entrypoint": str,
        "runtimeEnvYAML": str,
        "jobId": str,
        "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
        "entrypointResources": str,
        "entrypointNumCpus": float,
        "entrypointNumGpus": float,
        "ttlSecondsAfterFinished": int,
        "preRunningDeadlineSeconds": int,
        "shutdownAfterJobFinishes": bool,
        "suspend": bool,
    },
}


def _load(name: str) -> dict[str, Any]:
    return yaml.safe_load((MANIFESTS / name).read_text())


def _kubernetes(name: str) -> dict[str, dict[str, Any]]:
    """Resources of a file by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((MANIFESTS / name).read_text())}


AWS = _load("ray-up-aws.yaml")
ON_PREMISE = _load("ray-up-onprem.yaml")
CLUSTER = _kubernetes("kuberay-cluster.yaml")
JOBS = _kubernetes("kuberay-job.yaml")
JOB = JOBS["RayJob"]
SPEC = CLUSTER["RayCluster"]["spec"]


def _groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def _validate_pod(template: dict[str, Any]) -> None:
    resource = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
    kubernetes_validate.validate(resource, KUBERNETES, strict=True)


# ------------------------------------------------------------------------------------------------------------ KubeRay


def _misfits(value: Any, kind: Any, where: str) -> Iterator[str]:
    """Where a value is none of the kind, by the reference."""
    if isinstance(kind, set):
        if value not in kind:
            yield f"{where}: {value!r} is none of {sorted(kind)}"
    elif isinstance(kind, list):
        if not isinstance(value, list):
            yield f"{where}: no array"
        else:
            for index, each in enumerate(value):
                yield from _misfits(each, kind[0], f"{where}[{index}]")
    elif isinstance(kind, type):
        if type(value) is not kind:
            yield f"{where}: {value!r} is no {kind.__name__}"
    elif kind == "map":
        for key, each in value.items():
            yield from _misfits(each, str, f"{where}.{key}")
    elif kind == "unused":
        yield f"{where}: its type is not in the table"
    elif kind not in ("pod", "metadata"):
        for key, each in value.items():
            if key not in KUBERAY[kind]:
                yield f"{where}.{key}: no field of {kind}"
            else:
                yield from _misfits(each, KUBERAY[kind][key], f"{where}.{key}")


@pytest.mark.parametrize("resource", [CLUSTER["RayCluster"], JOB], ids=["cluster", "job"])
def test_every_field_is_one_of_kuberays_reference(resource: dict[str, Any]) -> None:
    assert list(_misfits(resource, resource["kind"], resource["kind"])) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda spec: spec.update(autoscalerOption={}), "spec.autoscalerOption: no field"),
        (lambda spec: spec["autoscalerOptions"].update(version="v3"), "version: 'v3' is none"),
        (lambda spec: spec["workerGroupSpecs"][0].update(maxReplicas="4"), "maxReplicas: '4' is no int"),
        (lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "num-cpus: 0 is no str"),
    ],
)
def test_a_wrong_field_would_be_found(change: Callable[[dict[str, Any]], Any], found: str) -> None:
    resource = copy.deepcopy(CLUSTER["RayCluster"])
    change(resource["spec"])
    assert any(found in misfit for misfit in _misfits(resource, "RayCluster", "RayCluster"))


def _autoscaling() -> dict[str, Any]:
    """What Ray's autoscaler makes of the RayCluster; Ray holds it against the schema of its clusters."""
    resource = copy.deepcopy(CLUSTER["RayCluster"])
    resource["metadata"]["namespace"] = "default"
    return _derive_autoscaling_config_from_ray_cr(resource)


def test_ray_reads_the_cluster_as_meant() -> None:
    config = _autoscaling()
    kinds = config["available_node_types"]
    head = kinds.pop(config["head_node_type"])
    assert (head["resources"]["CPU"], head["labels"]) == (0, {"kdray-role": "head"})
    assert set(kinds) == set(ROLES)
    for role, (most, gpus, accelerator) in ROLES.items():
        kind = kinds[role]
        assert (kind["min_workers"], kind["max_workers"]) == (0, most)
        assert kind["resources"].get("GPU", 0) == gpus
        assert kind["resources"]["CPU"] > 0
        expected = {"kdray-role": role} | ({ACCELERATOR_LABEL: accelerator} if accelerator else {})
        assert kind["labels"] == expected
    assert config["max_workers"] == sum(most for most, _, _ in ROLES.values())
    # A student's pods outlive the pauses of an evaluation; idle teachers cost more than they bring.
    assert kinds["student"]["idle_timeout_s"] > kinds["teacher-large"]["idle_timeout_s"]


def test_the_ray_version_is_the_one_that_is_installed() -> None:
    assert SPEC["rayVersion"] == version("ray")


def test_a_job_brings_the_same_cluster() -> None:
    assert JOB["spec"]["rayClusterSpec"] == SPEC


@pytest.mark.parametrize("group", _groups(SPEC), ids=lambda group: group.get("groupName", "head"))
def test_pods_are_what_kubernetes_takes(group: dict[str, Any]) -> None:
    template = group["template"]
    _validate_pod(template)
    pod = template["spec"]
    (container,) = pod["containers"]
    # What no schema sees: mounts have volumes, sizes are quantities, GPUs cannot be asked for without being limited.
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["resources"]["limits"] == container["resources"]["requests"]
    sizes = {name: parse_quantity(amount) for name, amount in container["resources"]["limits"].items()}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    shm = parse_quantity(volumes["shm"]["emptyDir"]["sizeLimit"])
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert int(group["rayStartParams"]["object-store-memory"]) < shm < sizes["memory"]
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == CLUSTER["PersistentVolumeClaim"]["metadata"]["name"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["image"].endswith(":gpu" if "nvidia.com/gpu" in sizes else ":cpu")


def test_a_misspelt_key_of_a_pod_would_be_found() -> None:
    template = copy.deepcopy(SPEC["headGroupSpec"]["template"])
    template["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(ValidationError, match="volumeMount"):
        _validate_pod(template)


def test_the_shared_folder_can_be_written_by_every_node() -> None:
    claim = CLUSTER["PersistentVolumeClaim"]
    kubernetes_validate.validate(claim, KUBERNETES, strict=True)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    config = load_config(RECIPE, [])
    mounts = {mount["mountPath"] for mount in SPEC["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert {str(Path("/", config.run.output.parts[1])), str(Path("/", Path(config.data.prompts.path).parts[1]))} <= mounts


SECRET = r"RAY_AUTH_TOKEN=|kind: Secret|(?i:(password|token|secret|key): *['\"]?[a-z0-9+/]{16,})|AKIA[A-Z0-9]|hf_[A-Za-z]"


def test_clusters_ask_for_a_token_and_files_hold_no_secret() -> None:
    assert SPEC["authOptions"] == {"mode": "token"}
    for path in [*MANIFESTS.glob("*.yaml"), ROOT / "Dockerfile"]:
        text = path.read_text()
        assert not re.search(SECRET, text), path.name


def test_pods_get_the_secrets_of_their_part_alone() -> None:
    """By name; without the Secret the pods start, too."""
    found = {
        group.get("groupName", "head"): [each["secretRef"] for each in group["template"]["spec"]["containers"][0]["envFrom"]]
        for group in _groups(SPEC)
    }
    parts = {"head": ["hub", "storage", "driver"], "student": ["hub", "storage"]}
    assert found == {
        role: [{"name": f"kdray-{name}", "optional": True} for name in parts.get(role, ["hub"])] for role in ["head", *ROLES]
    }


def _beyond_restricted(pod: dict[str, Any], containers: list[dict[str, Any]]) -> list[str]:
    """What the profile "restricted" of Kubernetes' Pod Security Standards forbids, of what these pods could have."""
    shared = pod.get("securityContext", {})
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    kinds = {"name", "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    found += [f"volume {volume['name']}" for volume in pod.get("volumes", []) if not set(volume) <= kinds]
    for container in containers:
        own = shared | container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            found.append("privileges")
        if own.get("capabilities") != {"drop": ["ALL"]}:
            found.append("capabilities")
        if not own.get("runAsNonRoot") or not own.get("runAsUser"):
            found.append("root")
        if own.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            found.append("seccomp")
        found += [f"host port {port['hostPort']}" for port in container.get("ports", []) if port.get("hostPort")]
    return found


def test_pods_pass_the_restricted_profile() -> None:
    for group in _groups(SPEC):
        pod = group["template"]["spec"]
        assert _beyond_restricted(pod, pod["containers"]) == []
        bare = {**pod, "securityContext": {}, "hostNetwork": True, "volumes": [{"name": "x", "hostPath": {"path": "/"}}]}
        assert set(_beyond_restricted(bare, [{}])) == {
            "hostNetwork", "volume x", "privileges", "capabilities", "root", "seccomp",
        }  # fmt: skip
    # KubeRay puts Ray's autoscaler into the head's pod, with a context of its own.
    sidecar = {"securityContext": SPEC["autoscalerOptions"]["securityContext"]}
    assert _beyond_restricted(SPEC["headGroupSpec"]["template"]["spec"], [sidecar]) == []


def test_only_the_clusters_pods_and_the_operator_reach_it() -> None:
    policy = CLUSTER["NetworkPolicy"]
    kubernetes_validate.validate(policy, KUBERNETES, strict=True)
    assert JOBS["NetworkPolicy"] == policy
    own = policy["spec"]["podSelector"]["matchLabels"]
    assert all(group["template"]["metadata"]["labels"] == own for group in _groups(SPEC))
    cluster, operator = policy["spec"]["ingress"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert cluster == {"from": [{"podSelector": {"matchLabels": own}}]}
    head = SPEC["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    assert {"name": "dashboard", "containerPort": operator["ports"][0]["port"]} in head
    # One entry with both selectors: these pods in any namespace. Two entries would be every pod of every namespace.
    assert [set(each) for each in operator["from"]] == [{"namespaceSelector", "podSelector"}]


def test_a_retried_job_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    spec = JOB["spec"]
    assert (spec["submissionMode"], spec["shutdownAfterJobFinishes"], spec["backoffLimit"]) == ("HTTPMode", True, 3)
    config = load_config(RECIPE, [])
    line = spec["entrypoint"]
    # As Ray's job supervisor does: by a shell. Its words are what kdray's command line gets.
    shell = line.replace(str(config.run.output), str(tmp_path)).replace("kdray run", "printf '%s\\n'", 1)
    grace_s = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    words = ["/opt/kdray/configs/on_cluster.yaml", f"cluster.grace_s={grace_s}", "--supervise"]
    assert subprocess.run(shell, shell=True, capture_output=True, text=True, check=True).stdout.split() == words
    (tmp_path / config.run.name).mkdir()
    (tmp_path / config.run.name / "config.yaml").touch()
    assert subprocess.run(shell, shell=True, capture_output=True, text=True, check=True).stdout.split() == [*words, "--resume"]
    # Ray hands variables to a job as strings.
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}


# ------------------------------------------------------------------------------------------------------------- ray up


@pytest.fixture(scope="module")
def instance_types() -> dict[str, dict[str, Any]]:
    """EC2's own description of its instance types, as moto carries it."""
    with gzip.open(Path(moto.__file__).parent / "ec2" / "resources" / "instance_types.json.gz", "rt") as file:
        return json.load(file)


def test_ray_takes_the_file_for_aws() -> None:
    config = prepare_config(copy.deepcopy(AWS))
    validate_config(config)
    kinds = config["available_node_types"]
    assert (config["head_node_type"], kinds["head"]["max_workers"], kinds["head"]["resources"]) == ("head", 0, {"CPU": 0})
    for role, (most, gpus, accelerator) in ROLES.items():
        assert (kinds[role]["min_workers"], kinds[role]["max_workers"]) == (0, most)
        assert kinds[role]["resources"].get("GPU", 0) == gpus
        assert kinds[role]["labels"]["kdray-role"] == role
        assert kinds[role]["labels"].get(ACCELERATOR_LABEL) == accelerator
    assert config["max_workers"] == sum(most for most, _, _ in ROLES.values())


def test_an_unknown_key_of_a_node_type_would_be_found() -> None:
    config = prepare_config(copy.deepcopy(AWS))
    config["available_node_types"]["student"]["label"] = {}
    with pytest.raises(ValidationError, match="label"):
        validate_config(config)


def test_instances_have_what_the_file_says(instance_types: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws, "list_ec2_instances", lambda region, credentials=None: list(instance_types.values()))
    bare = prepare_config(copy.deepcopy(AWS))
    for kind in bare["available_node_types"].values():
        kind["resources"] = {}
    seen = aws.AWSNodeProvider.fillout_available_node_types_resources(bare)["available_node_types"]
    for role, (_, gpus, accelerator) in ROLES.items():
        resources = seen[role]["resources"]
        said = AWS["available_node_types"][role]["resources"]
        assert (resources["CPU"], resources.get("GPU", 0)) == (said["CPU"], said.get("GPU", 0)) == (said["CPU"], gpus)
        assert [name for name in resources if name.startswith("accelerator_type:")] == (
            [f"accelerator_type:{accelerator}"] if accelerator else []
        )


def test_ec2_takes_the_launch_parameters() -> None:
    shape = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, kind in AWS["available_node_types"].items():
        node = kind["node_config"]
        report = ParamValidator().validate({**node, "MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        assert node["InstanceType"] in shape.members["InstanceType"].enum
        market = node.get("InstanceMarketOptions", {}).get("MarketType", "on-demand")
        # What goes without notice is what a run can lose: never the head or the student.
        assert (market == "spot") == (name in ("teacher-large", "teacher-small", "rollouts"))
        assert kind["labels"].get("ray.io/market-type", "on-demand") == market


def test_ray_takes_the_file_for_machines_of_your_own() -> None:
    config = prepare_config(copy.deepcopy(ON_PREMISE))
    validate_config(config)
    (kind,) = config["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(ON_PREMISE["provider"]["worker_ips"])
    # Ray gives no labels to such nodes: each has its own in a file, which the container must see.
    (start,) = (command for command in ON_PREMISE["worker_start_ray_commands"] if "ray start" in command)
    folder = Path(re.search(r"--labels-file=(\S+)", start)[1]).parent
    assert f"--volume {folder}:{folder}:ro" in ON_PREMISE["docker"]["run_options"]


def test_rays_autoscaler_finds_an_image_for_every_kind_of_node() -> None:
    read = AutoscalingConfig(copy.deepcopy(AWS), skip_content_hash=True)
    for name, kind in AWS["available_node_types"].items():
        image = read.get_docker_config(name)["image"]
        assert image.endswith(":gpu" if "GPU" in kind["resources"] else ":cpu")
    own = prepare_config(copy.deepcopy(ON_PREMISE))
    assert AutoscalingConfig(own, skip_content_hash=True).get_docker_config(own["head_node_type"])["image"].endswith(":gpu")


@pytest.mark.parametrize("config", [AWS, ON_PREMISE], ids=["aws", "onprem"])
def test_every_node_has_the_token_and_uses_it(config: dict[str, Any]) -> None:
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = (command for command in commands if "ray start" in command)
        assert start.startswith("RAY_AUTH_MODE=token ray start ")
    head, worker = (config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker


# -------------------------------------------------------------------------------------------------- roles and labels


def _aws_nodes() -> list[Node]:
    kinds = [kind for name, kind in AWS["available_node_types"].items() if name != AWS["head_node_type"]]
    return [Node(kind["resources"], kind["labels"], "aws") for kind in kinds for _ in range(kind["max_workers"])]


def _kubernetes_nodes() -> list[Node]:
    kinds = _autoscaling()["available_node_types"].values()
    return [Node(kind["resources"], kind["labels"], "kubernetes") for kind in kinds for _ in range(kind["max_workers"])]


def _pods() -> list[Node]:
    """Nodes as Ray sees them in the pods, each kind at its most, with their object stores."""
    nodes = []
    for group in _groups(SPEC):
        limits, given = group["template"]["spec"]["containers"][0]["resources"]["limits"], group["rayStartParams"]
        resources = {
            "CPU": float(given.get("num-cpus", limits["cpu"])),
            "GPU": float(limits.get("nvidia.com/gpu", 0)),
            "memory": float(parse_quantity(limits["memory"])),
            "object_store_memory": float(given["object-store-memory"]),
            HEAD: float("groupName" not in group),
        }
        nodes += [Node(resources, group["labels"], "pod") for _ in range(group.get("maxReplicas", 1))]
    return nodes


QWEN = {
    "student": (1536, 8960, 28, 12, 2, 151936, True),
    "large": (5120, 13824, 48, 40, 8, 152064, False),
    "small": (3584, 18944, 28, 28, 4, 152064, False),
}
"""Of the recipe's models: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """configs/on_cluster.yaml with the shapes of its models in folders, as no test asks the hub."""
    folder = tmp_path_factory.mktemp("models")
    for name, (hidden, intermediate, layers, heads, kv_heads, vocab, tied) in QWEN.items():
        Qwen2Config(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocab,
            tie_word_embeddings=tied,
        ).save_pretrained(folder / name)
    teachers = [f"teachers.{name}.model={folder / name}" for name in ("large", "small")]
    return load_config(RECIPE, [f"student.model={folder / 'student'}", *teachers])


@pytest.mark.parametrize("nodes", [_aws_nodes(), _kubernetes_nodes()], ids=["aws", "kubernetes"])
def test_the_recipe_finds_its_roles_on_the_clusters(recipe: Config, nodes: list[Node]) -> None:
    wanted = {bundle.role: bundle for bundle in bundles(recipe)}
    homes = {
        role: {node.labels["kdray-role"] for node in nodes if matches(node.labels, each.labels)}
        for role, each in wanted.items()
    }
    assert homes == {
        "teacher large": {"teacher-large"},
        "teacher small": {"teacher-small"},
        "rollout pool": {"rollouts"},
        "student": {"student"},
    }
    found = plan(recipe, nodes)
    placed = {role.bundle.role: role for role in found.roles}
    for role, home in homes.items():
        (where,) = placed[role].nodes
        assert f"kdray-role={home.pop()}" in where.split()
    assert sum(placed["student"].nodes.values()) == recipe.training.ranks
    assert not any("may grow" in line or "warning" in line for line in found.lines), found.lines


@pytest.mark.parametrize("config", [AWS, _autoscaling()], ids=["aws", "kubernetes"])
def test_rays_autoscaler_brings_a_node_of_every_kind_for_the_recipe(config: dict[str, Any]) -> None:
    # The reservation's placement group, as Ray's autoscaler is told of it while no worker is there.
    wanted = [
        ResourceRequestUtil.make(
            dict(bundle.resources),
            label_selectors=[[(key, LabelSelectorOperator.LABEL_OPERATOR_IN, [value]) for key, value in bundle.labels.items()]],
        )
        for bundle in bundles(load_config(RECIPE, []))
        for _ in range(bundle.count)
    ]
    read = AutoscalingConfig(copy.deepcopy(config), skip_content_hash=True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=read.get_node_type_configs(),
        max_num_nodes=read.get_max_num_nodes(),
        gang_resource_requests=[GangResourceRequest(requests=wanted)],
    )
    reply = ResourceDemandScheduler(None).schedule(request)
    assert not reply.infeasible_gang_resource_requests
    assert {launch.instance_type: launch.count for launch in reply.to_launch} == dict.fromkeys(ROLES, 1)


# -------------------------------------------------------------------------------------------------------------- docs


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "clusters.md").read_text(), re.DOTALL)


def test_the_documented_cluster_is_that_of_the_files(recipe: Config, tmp_path: Path) -> None:
    (text,) = (block for block in _blocks("yaml") if block.startswith("nodes:"))
    described = tmp_path / "cluster.yaml"
    described.write_text(text)
    nodes = described_nodes(described)

    def kinds(nodes: list[Node]) -> dict[str, tuple[int, float, float]]:
        of = {node.labels["kdray-role"]: node for node in nodes}
        count = [node.labels["kdray-role"] for node in nodes].count
        return {role: (count(role), node.resources["CPU"], node.resources.get("GPU", 0)) for role, node in of.items()}

    assert kinds(nodes) == kinds(_aws_nodes())
    overrides = [f"teachers.{name}.model={recipe.teachers[name].model}" for name in recipe.teachers]
    arguments = ["plan", str(RECIPE), f"student.model={recipe.student.model}", *overrides, "--cluster", str(described)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "bottleneck" in done.output or "rates" in done.output


def test_an_8b_student_fits_the_pods(recipe: Config, tmp_path: Path) -> None:
    """Its versions fit the object stores and /dev/shm, its engines and ranks their memory, the batches the head."""
    folder = tmp_path / "student"
    Qwen2Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=151936,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    teachers = [f"teachers.{name}.model={teacher.model}" for name, teacher in recipe.served_teachers.items()]
    # Beside 8B of student, a 7B teacher takes two of its GPUs.
    two = [f"cluster.roles.teachers.small.{setting}=2" for setting in ("tensor_parallel_size", "num_gpus")]
    settings = [f"student.model={folder}", "training.zero_stage=2", *teachers, *two]
    found = plan(load_config(RECIPE, settings), _pods())
    assert not any("note:" in line or "warning" in line for line in found.lines), found.lines
    # What is in /dev/shm at most is in the plan's line: it has to fit there as well.
    (line,) = (line for line in found.lines if line.startswith("publication: "))
    most = float(re.search(r"([\d.]+) on a node of replicas", line)[1])
    for group in SPEC["workerGroupSpecs"]:
        (shm,) = (volume for volume in group["template"]["spec"]["volumes"] if volume["name"] == "shm")
        assert most * 2**30 < parse_quantity(shm["emptyDir"]["sizeLimit"])


def test_documented_roles_are_the_recipes() -> None:
    (text,) = (block for block in _blocks("yaml") if block.startswith("cluster:") and "roles:" in block)
    assert yaml.safe_load(text)["cluster"] == yaml.safe_load(RECIPE.read_text())["cluster"]


def test_documented_files_exist() -> None:
    text = (ROOT / "docs" / "clusters.md").read_text()
    named = re.findall(r"(?:cluster/manifests|configs|tests|docs)/[\w/.-]+\.(?:yaml|json|py|md)", text)
    assert {f"cluster/manifests/{path.name}" for path in MANIFESTS.iterdir()} <= set(named)
    assert all((ROOT / name).exists() for name in named)


# -------------------------------------------------------------------------------------------------------- Dockerfile


def _instructions() -> list[tuple[str, str, str]]:
    """Stage ("" before the first), instruction and arguments of every line of the Dockerfile, continuations joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.strip() and not line.startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    stage, found = "", []
    for line in text.splitlines():
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            stage = rest.split(" AS ")[1]
        found.append((stage, word, rest))
    return found


def _requirement(name: str) -> str:
    extras = PROJECT["project"]["optional-dependencies"]
    (found,) = (each for each in [*PROJECT["project"]["dependencies"], *extras["cpu"]] if re.match(rf"{name}(\[.*\])?==", each))
    return found.split("==")[1].removesuffix(".*")


def test_images_for_cpu_and_gpu_are_built_and_tried() -> None:
    instructions = _instructions()
    known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "CMD"}
    assert {word for _, word, _ in instructions} <= known
    stages = [rest.split(" AS ")[1] for _, word, rest in instructions if word == "FROM"]
    assert stages == ["wheel", "base", "cpu", "gpu"]
    for target in ("cpu", "gpu"):
        mine = [(word, rest) for stage, word, rest in instructions if stage == target]
        assert any(word == "RUN" and f"[{target}]" in rest and "/wheels/kdray-" in rest for word, rest in mine)
        locked = f"pip install --require-hashes --no-deps --requirement /requirements/{target}.lock"
        assert any(word == "RUN" and 'if [ -n "${LOCKED}" ]; then' in rest and locked in rest for word, rest in mine)
        assert (ROOT / "requirements" / f"{target}.lock").is_file()
        # Not root; what was installed is run, by that user; and Ray's launcher may run commands of its own in it.
        assert mine.index(("USER", "kdray")) < mine.index(("RUN", "kdray --version && ray --version"))
        assert mine[-1] == ("CMD", '["kdray", "--help"]')
        assert target in PROJECT["project"]["optional-dependencies"]
    assert any(word == "ENV" and "HOME=/home/kdray" in rest for stage, word, rest in instructions if stage == "base")
    users = {str(group["template"]["spec"]["securityContext"]["runAsUser"]) for group in _groups(SPEC)}
    assert users == {re.search(r"useradd --uid (\d+)", (ROOT / "Dockerfile").read_text())[1]}


def test_image_versions_are_the_projects() -> None:
    arguments = dict(rest.split("=", 1) for _, word, rest in _instructions() if word == "ARG")
    setup = (ROOT / "setup.sh").read_text()
    assert arguments["TORCH"] == re.search(r"^torch=(\S+)", setup, re.MULTILINE)[1]
    assert arguments["TORCH"].startswith(_requirement("torch") + ".")
    assert arguments["TORCH_INDEX"] == re.search(r"--extra-index-url (\S+)", setup)[1]
    assert SPEC["rayVersion"].startswith(_requirement("ray") + ".")
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["project"]["requires-python"]).groups()
    assert int(low) <= int(arguments["PYTHON"].split(".")[1]) < int(high)
    removed = re.search(r"uninstall --quiet --yes (.+)", setup)[1]
    assert any(f"pip uninstall --yes {removed}" in rest for stage, _, rest in _instructions() if stage == "cpu")


def test_what_images_copy_is_there_and_nothing_else_is_sent() -> None:
    copied = [rest.split()[:-1] for _, word, rest in _instructions() if word == "COPY"]
    bound = re.findall(r"type=bind,source=(\S+),target=", (ROOT / "Dockerfile").read_text())
    sources = [*(source for each in copied for source in each), *bound]
    assert all((ROOT / source).exists() for source in sources)
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == set(sources)
    packages = {include.rstrip("*") for include in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= set(sources)
    assert all(any(fnmatch.fnmatch(f"a/{name}", rule) for rule in rules[1:]) for name in ("__pycache__", "kdray.egg-info"))
    # The wheel's build reads them.
    assert {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml"} <= set(sources)
