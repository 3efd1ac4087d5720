"""drive.py SOCKET KERNEL DISK OTHER_DISK DIRECTORY [TAP]: drives a monitor through every resource; those of a network only with a
tap for it.

It leaves the machine paused, and in DIRECTORY the snapshot that load.py goes on from.

The client is `firecracker.api.Api` of the package firecracker-python, as it was published. The package's
`__init__` imports a docker client and looks for a Firecracker binary; neither is part of the API, so only the submodule
is imported.
"""

import importlib.util
import sys
import types


def published_api():
    """The class Api and its error, without running the package's __init__."""
    if "firecracker.api" in sys.modules:
        return sys.modules["firecracker.api"].Api, sys.modules["firecracker.api"].APIError
    spec = importlib.util.find_spec("firecracker")
    package = types.ModuleType("firecracker")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["firecracker"] = package
    from firecracker.api import Api
    from firecracker.exceptions import APIError

    return Api, APIError


def renewed(api):
    """A new client for the same socket. The client keeps one connection for each path, and Firecracker takes ten."""
    api.close()
    return published_api()[0](api.socket)


def refused(socket, call):
    """Checks that a call is refused with a fault message, by a client of its own."""
    Api, APIError = published_api()
    api = Api(socket)
    try:
        call(api)
    except APIError as fault:
        assert str(fault).startswith("API fault: "), fault
        return
    finally:
        api.close()
    raise AssertionError("a call was not refused")


def create(api, directory, name, kind):
    """Makes a snapshot of a paused machine."""
    api.create_snapshot.put(
        snapshot_path=f"{directory}/{name}.state", mem_file_path=f"{directory}/{name}.memory", snapshot_type=kind)


def put_network(api, tap):
    """What a guest has with a network, in the order and with the fields of the published client's own `MicroVM.create`."""
    api.network.put(iface_id="eth0", host_dev_name=tap, guest_mac="06:00:ac:10:00:02")
    api.mmds_config.put(version="V2", ipv4_address="169.254.170.2", network_interfaces=["eth0"])
    api.mmds.put(latest={"meta-data": {"instance-id": "one", "local-hostname": "one"}})
    assert api.mmds.get().json()["latest"]["meta-data"]["instance-id"] == "one"
    refused(api.socket, lambda api: api.mmds_config.put(version="V3", network_interfaces=["eth0"]))
    refused(api.socket, lambda api: api.network.put(iface_id="eth1", host_dev_name=tap, guest_mac="no"))


def change_network(api):
    """The same, while the guest runs."""
    api.network.patch(iface_id="eth0", rx_rate_limiter={"bandwidth": {"size": 1 << 20, "refill_time": 100}})
    api.mmds.patch(latest={"meta-data": {"instance-id": "two"}})
    told = api.mmds.get().json()["latest"]["meta-data"]
    assert told == {"instance-id": "two", "local-hostname": "one"}, told
    refused(api.socket, lambda api: api.network.patch(iface_id="eth7"))


def main():
    socket, kernel, disk, other_disk, directory = sys.argv[1:6]
    tap = sys.argv[6] if len(sys.argv) > 6 else None
    api = published_api()[0](socket)

    assert api.describe.get().json()["state"] == "Not started"
    assert api.version.get().json()["firecracker_version"]
    assert api.machine_config.get().json()["vcpu_count"] == 1

    api.logger.put(level="Info", show_level=True, show_log_origin=False)
    api.machine_config.put(vcpu_count=2, mem_size_mib=96, track_dirty_pages=True)
    api.machine_config.patch(mem_size_mib=64)
    assert api.machine_config.get().json()["mem_size_mib"] == 64
    api.boot.put(kernel_image_path=kernel, boot_args="do=hello do=tick:ms=50,count=100000")
    api.drive.put(drive_id="data", path_on_host=disk, is_root_device=False, is_read_only=False,
                  rate_limiter={"ops": {"size": 1000, "refill_time": 100}})
    api = renewed(api)
    for path, body in {
        "/cpu-config": {"cpuid_modifiers": []},
        "/entropy": {},
        "/serial": {},
        "/metrics": {"metrics_path": f"{directory}/test-metrics"},
        "/balloon": {"amount_mib": 1, "deflate_on_oom": True, "stats_polling_interval_s": 1},
    }.items():
        api.actions.request("PUT", path, **body)
    api.vsock.put(guest_cid=3, uds_path=f"{directory}/test-vsock")
    if tap:
        api = renewed(api)
        put_network(api, tap)

    refused(socket, lambda api: api.boot.put(kernel_image_path="/nowhere"))
    refused(socket, lambda api: api.machine_config.put(vcpu_count=33, mem_size_mib=64))
    refused(socket, lambda api: api.drive.put(drive_id="data", path_on_host=disk))
    refused(socket, lambda api: api.drive.patch(drive_id="data", path_on_host=other_disk))
    refused(socket, lambda api: api.vm.patch(state="Paused"))
    refused(socket, lambda api: create(api, directory, "early", "Full"))
    refused(socket, lambda api: api.load_snapshot.put(
        snapshot_path=f"{directory}/none", mem_file_path=f"{directory}/none"))

    api = renewed(api)
    api.actions.put(action_type="InstanceStart")
    assert api.describe.get().json()["state"] == "Running"
    refused(socket, lambda api: api.actions.put(action_type="InstanceStart"))
    refused(socket, lambda api: api.machine_config.put(vcpu_count=1, mem_size_mib=64))
    api.vm.patch(state="Paused")
    assert api.describe.get().json()["state"] == "Paused"
    api.vm.patch(state="Resumed")
    api.drive.patch(drive_id="data", path_on_host=other_disk)
    api.drive.patch(drive_id="data", rate_limiter={"ops": {"size": 500, "refill_time": 100}})
    api = renewed(api)
    config = api.vm_config.get().json()
    assert config["machine-config"]["vcpu_count"] == 2, config
    assert config["drives"][0]["path_on_host"] == other_disk, config
    assert config["vsock"]["guest_cid"] == 3, config
    api.actions.request("PATCH", "/balloon", amount_mib=2)
    api.actions.request("PATCH", "/balloon/statistics", stats_polling_interval_s=2)
    if tap:
        assert config["network-interfaces"][0]["host_dev_name"] == tap, config
        api = renewed(api)
        change_network(api)
    api.actions.put(action_type="FlushMetrics")
    refused(socket, lambda api: create(api, directory, "running", "Full"))
    api = renewed(api)
    api.vm.patch(state="Paused")
    create(api, directory, "first", "Full")
    api.vm.patch(state="Resumed")
    api.vm.patch(state="Paused")
    create(api, directory, "diff", "Diff")
    # By its default it is a full one.
    create(api, directory, "full", None)
    assert api.describe.get().json()["state"] == "Paused"
    api.close()
    print("every resource was driven")


if __name__ == "__main__":
    main()
