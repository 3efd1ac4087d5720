"""load.py SOCKET DIRECTORY HOW: lets a fresh monitor go on from the snapshot that drive.py has left in DIRECTORY.

HOW is `paused`, by the fields that Firecracker has deprecated, and the machine does not run on; or `resumed`, with the fields
that the published client's own `MicroVM.snapshot` sends.
"""

import sys

from drive import create, published_api, refused, renewed


def load_paused(api, directory):
    api.load_snapshot.put(
        snapshot_path=f"{directory}/full.state", mem_file_path=f"{directory}/full.memory", track_dirty_pages=False,
        resume_vm=False)
    assert api.describe.get().json()["state"] == "Paused"


def load_resumed(api, directory):
    backend = {"backend_type": "File", "backend_path": f"{directory}/full.memory"}
    refused(api.socket, lambda api: api.load_snapshot.put(
        snapshot_path=f"{directory}/full.state", mem_backend=backend, mem_file_path=f"{directory}/full.memory"))
    refused(api.socket, lambda api: api.load_snapshot.put(snapshot_path=f"{directory}/full.state"))
    refused(api.socket, lambda api: create(api, directory, "early", "Full"))
    api.load_snapshot.put(
        snapshot_path=f"{directory}/full.state", mem_backend=backend, enable_diff_snapshots=True, resume_vm=True)
    assert api.describe.get().json()["state"] == "Running"
    refused(api.socket, lambda api: api.load_snapshot.put(
        snapshot_path=f"{directory}/full.state", mem_backend=backend))
    api = renewed(api)
    config = api.vm_config.get().json()
    assert config["machine-config"]["mem_size_mib"] == 64, config
    assert config["machine-config"]["track_dirty_pages"] is True, config
    assert config["drives"][0]["drive_id"] == "data", config
    api.vm.patch(state="Paused")
    create(api, directory, "next", "Diff")
    api.vm.patch(state="Resumed")
    api.actions.put(action_type="SendCtrlAltDel")
    api.close()


def main():
    socket, directory, how = sys.argv[1:]
    api = published_api()[0](socket)
    {"paused": load_paused, "resumed": load_resumed}[how](api, directory)
    api.close()
    print(f"the snapshot was loaded: {how}")


if __name__ == "__main__":
    main()
