//! Dependencies between crates point one way, and two kinds of system calls have one home each.

use serde::Deserialize;
use std::process::Command;

use crate::tree;

#[derive(Deserialize)]
pub(crate) struct Metadata {
    pub(crate) packages: Vec<Package>,
    pub(crate) workspace_members: Vec<String>,
    pub(crate) resolve: Resolve,
}

#[derive(Deserialize)]
pub(crate) struct Package {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) license: Option<String>,
    pub(crate) source: Option<String>,
    pub(crate) dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
pub(crate) struct Dependency {
    pub(crate) name: String,
    pub(crate) kind: Option<String>,
}

#[derive(Deserialize)]
pub(crate) struct Resolve {
    pub(crate) nodes: Vec<Node>,
}

#[derive(Deserialize)]
pub(crate) struct Node {
    pub(crate) id: String,
}

impl Metadata {
    /// What cargo resolves for the one target that we build.
    pub(crate) fn read() -> Self {
        let printed = Command::new(env!("CARGO"))
            .args([
                "metadata",
                "--format-version=1",
                "--filter-platform=x86_64-unknown-linux-gnu",
                "--locked",
            ])
            .current_dir(tree::root())
            .output()
            .expect("cargo runs this test");
        assert!(
            printed.status.success(),
            "cargo metadata: {}",
            String::from_utf8_lossy(&printed.stderr)
        );
        serde_json::from_slice(&printed.stdout).expect("cargo metadata prints its own format 1")
    }

    /// The packages that are built for that target.
    pub(crate) fn resolved(&self) -> impl Iterator<Item = &Package> {
        self.packages
            .iter()
            .filter(|p| self.resolve.nodes.iter().any(|node| node.id == p.id))
    }

    fn members(&self) -> impl Iterator<Item = &Package> {
        self.packages
            .iter()
            .filter(|p| self.workspace_members.contains(&p.id))
    }
}

/// Each member of the workspace and the members that it may use. A new member gets a line here.
const MAY_USE: &[(&str, &[&str])] = &[
    ("coracle-jailer", &[]),
    ("coracle-agent", &[]),
    ("coracle-storage", &[]),
    ("coracle-devices", &["coracle-storage"]),
    ("coracle-vmm", &["coracle-devices", "coracle-storage"]),
    (
        "coracle-ctl",
        &["coracle-agent", "coracle-vmm", "coracle-storage"],
    ),
    (
        "coracle-tests",
        &[
            "coracle-agent",
            "coracle-storage",
            "coracle-devices",
            "coracle-vmm",
            "coracle-ctl",
        ],
    ),
];

/// Crates that only the named members may use.
const ONE_HOME: &[(&str, &[&str])] = &[
    ("kvm-ioctls", &["coracle-vmm"]),
    ("kvm-bindings", &["coracle-vmm"]),
    ("linux-loader", &["coracle-vmm"]),
    // The tests measure it beside what does without it.
    ("io-uring", &["coracle-storage", "coracle-tests"]),
];

#[test]
fn members_depend_in_one_direction_only() {
    let metadata = Metadata::read();
    let members: Vec<&Package> = metadata.members().collect();
    assert!(members.len() > 3, "cargo metadata names the workspace's members");
    for member in &members {
        let (_, allowed) = MAY_USE
            .iter()
            .find(|(name, _)| *name == member.name)
            .unwrap_or_else(|| panic!("{} is a new member: say in MAY_USE what it may use", member.name));
        for used in &member.dependencies {
            let is_ours = members.iter().any(|m| m.name == used.name);
            assert!(
                !is_ours || allowed.contains(&used.name.as_str()),
                "{} uses {}, which is against the direction",
                member.name,
                used.name
            );
        }
    }
}

#[test]
fn kvm_and_io_uring_have_one_home_each() {
    let metadata = Metadata::read();
    for member in metadata.members() {
        for used in member
            .dependencies
            .iter()
            .filter(|d| d.kind.as_deref() != Some("dev"))
        {
            let home = ONE_HOME.iter().find(|(name, _)| *name == used.name);
            assert!(
                home.is_none_or(|(_, members)| members.contains(&member.name.as_str())),
                "{} uses {}, whose home is {home:?}",
                member.name,
                used.name
            );
        }
    }
}
