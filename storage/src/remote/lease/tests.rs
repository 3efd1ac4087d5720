#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use super::*;
use crate::lease::Owner;

/// Records in memory, some of which are not written.
#[derive(Clone, Debug, Default)]
struct Memory(Arc<Mutex<Vec<Link>>>);

#[derive(Clone, Debug)]
struct Link {
    epoch: u64,
    maker: Incarnation,
    record: Option<Record>,
}

impl Memory {
    /// Makes a step that says nothing yet.
    fn tear(&self, record: &Record) {
        self.0.lock().unwrap().push(Link {
            epoch: record.epoch,
            maker: record.owner.incarnation,
            record: None,
        });
    }
}

impl RemoteChain for Memory {
    fn name(&self) -> &str {
        "memory"
    }

    fn newest(&self) -> Result<Newest, OpenError> {
        Ok(match self.0.lock().unwrap().last() {
            None => Newest::None,
            Some(Link {
                record: Some(record), ..
            }) => Newest::Record(record.clone()),
            Some(Link { epoch, .. }) => Newest::Torn(*epoch),
        })
    }

    /// As a server has it: who has made a number first may write it.
    fn append(&self, record: &Record) -> Result<Option<Record>, OpenError> {
        let mut links = self.0.lock().unwrap();
        if let Some(link) = links.iter_mut().find(|link| link.epoch == record.epoch) {
            let is_ours = link.maker == record.owner.incarnation;
            if is_ours {
                link.record = Some(record.clone());
            }
            return Ok(link.record.clone().filter(|_| is_ours));
        }
        drop(links);
        self.tear(record);
        self.append(record)
    }
}

fn owner(life: u64) -> Owner {
    Owner {
        incarnation: Incarnation::simulated(life, life),
        ..Owner::of_this_process("vm")
    }
}

/// A lease that was offered, its records, and the step by which another takes it.
fn offered() -> (RemoteLease, Memory, Record) {
    let memory = Memory::default();
    let held = Record::after(None, Phase::Held, &owner(1)).unwrap();
    assert!(memory.append(&held).unwrap().is_some());
    let standing = Standing::default();
    standing.tell(Some(held.clone()));
    let mut lease = RemoteLease::new(Box::new(memory.clone()), standing);
    assert_eq!(lease.offer(), Some(held.offer()));
    lease.yield_fence();
    let taken = Record::after(Some(&held), Phase::Taken, &owner(2)).unwrap();
    (lease, memory, taken)
}

#[test]
fn a_step_that_says_nothing_is_not_cancelled_but_can_be_reclaimed() {
    let (lease, memory, taken) = offered();
    memory.tear(&taken);
    assert!(lease.oppose(Opposition::Cancel).is_err());
    assert_eq!(lease.oppose(Opposition::Reclaim).unwrap(), Contest::Won);
    // Whoever had begun it finds a newer one.
    let started = Record::after(Some(&taken), Phase::Started, &owner(2)).unwrap();
    assert_eq!(memory.append(&started).unwrap(), None);
    assert_eq!(
        lease.take_back(Some(owner(2).incarnation)).unwrap(),
        TakenBack::Done
    );
    assert_eq!(lease.offer().unwrap().incarnation, owner(1).incarnation);
}

#[test]
fn a_start_that_says_nothing_is_nobodys_until_it_is_written() {
    let (lease, memory, taken) = offered();
    assert!(memory.append(&taken).unwrap().is_some());
    let started = Record::after(Some(&taken), Phase::Started, &owner(2)).unwrap();
    memory.tear(&started);
    for opposition in [Opposition::Cancel, Opposition::Reclaim] {
        assert!(lease.oppose(opposition).is_err());
    }
    assert!(memory.append(&started).unwrap().is_some());
    assert_eq!(lease.oppose(Opposition::Reclaim).unwrap(), Contest::Gone(started));
}

#[test]
fn a_step_of_ours_that_says_nothing_is_written() {
    let (lease, memory, taken) = offered();
    let cancelled = Record {
        phase: Phase::Cancelled,
        owner: owner(1),
        ..taken.clone()
    };
    memory.tear(&cancelled);
    assert_eq!(lease.oppose(Opposition::Cancel).unwrap(), Contest::Won);
    assert_eq!(memory.append(&taken).unwrap(), None);
}
