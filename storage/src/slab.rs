//! Numbered places for things in flight; a place that was freed is used again.

/// A vector with holes: what is put in keeps its number until it is taken out.
#[derive(Debug)]
pub struct Slab<T> {
    places: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Slab<T> {
    /// An empty slab with room for `places` entries before it allocates again.
    pub fn with_capacity(places: usize) -> Self {
        Self {
            places: Vec::with_capacity(places),
            free: Vec::with_capacity(places),
        }
    }

    /// Stores `value` and returns its number.
    pub fn insert(&mut self, value: T) -> usize {
        let number = self.free.pop().unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() - 1
        });
        if let Some(place) = self.places.get_mut(number) {
            *place = Some(value);
        }
        number
    }

    /// The entry with this number, if there is one.
    pub fn get(&self, number: usize) -> Option<&T> {
        self.places.get(number)?.as_ref()
    }

    /// Every entry.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.places.iter().flatten()
    }

    /// The entry with this number, if there is one.
    pub fn get_mut(&mut self, number: usize) -> Option<&mut T> {
        self.places.get_mut(number)?.as_mut()
    }

    /// Takes the entry with this number out.
    pub fn remove(&mut self, number: usize) -> Option<T> {
        let value = self.places.get_mut(number)?.take()?;
        self.free.push(number);
        Some(value)
    }

    /// Takes every entry out, in the order of their numbers.
    pub fn take_all(&mut self) -> impl Iterator<Item = T> {
        self.free.clear();
        std::mem::take(&mut self.places).into_iter().flatten()
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_stays_with_its_entry_and_is_used_again_afterwards() {
        let mut slab = Slab::with_capacity(2);
        let first = slab.insert("first");
        let second = slab.insert("second");
        assert_eq!(slab.remove(first), Some("first"));
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.insert("third"), first);
        assert_eq!(slab.get_mut(second), Some(&mut "second"));
        assert_eq!(slab.len(), 2);
        assert!(slab.take_all().eq(["third", "second"]));
        assert!(slab.is_empty());
        assert_eq!(slab.insert("fourth"), 0);
    }
}
