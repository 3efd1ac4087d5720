//! Columns of text for people.

use std::fmt;

/// What separates two columns.
const GAP: &str = "   ";

/// A table whose columns are as wide as their longest cell.
#[derive(Clone, Debug)]
pub(crate) struct Table<const COLUMNS: usize> {
    rows: Vec<[String; COLUMNS]>,
}

impl<const COLUMNS: usize> Table<COLUMNS> {
    /// A table that has only its header.
    pub(crate) fn new(header: [&str; COLUMNS]) -> Self {
        Self {
            rows: vec![header.map(str::to_owned)],
        }
    }

    /// Adds a row; what a terminal would act on is made harmless.
    pub(crate) fn push(&mut self, row: [String; COLUMNS]) {
        self.rows.push(row.map(|cell| {
            if cell.is_empty() {
                "-".to_owned()
            } else {
                printable(&cell).replace('\n', " ")
            }
        }));
    }
}

impl<const COLUMNS: usize> fmt::Display for Table<COLUMNS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut widths = [0; COLUMNS];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.chars().count().max(*width);
            }
        }
        for row in &self.rows {
            let padded = row
                .iter()
                .zip(widths)
                .map(|(cell, width)| format!("{cell:<width$}"));
            writeln!(f, "{}", padded.collect::<Vec<_>>().join(GAP).trim_end())?;
        }
        Ok(())
    }
}

/// `text` with every control character replaced: names and messages come from other processes, and a
/// terminal obeys what it is sent.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_control() && c != '\n' {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect()
}

/// A size as people write it: in GiB where that is exact, else in MiB.
pub(crate) fn memory(mib: u64) -> String {
    if mib > 0 && mib.is_multiple_of(1024) {
        format!("{}G", mib / 1024)
    } else {
        format!("{mib}M")
    }
}

/// A time span with its two largest units.
pub(crate) fn span(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_have_no_trailing_space() {
        let mut table = Table::new(["ID", "STATE", "PID"]);
        table.push(["a-long-name".to_owned(), "Running".to_owned(), "7".to_owned()]);
        table.push(["é".to_owned(), String::new(), "123".to_owned()]);
        let expected = "ID            STATE     PID\n\
                        a-long-name   Running   7\n\
                        é             -         123\n";
        assert_eq!(table.to_string(), expected);
    }

    #[test]
    fn a_cell_cannot_steer_the_terminal() {
        let mut table = Table::new(["ID"]);
        table.push(["\u{1b}[2Jx\u{9b}".to_owned()]);
        assert_eq!(table.to_string(), "ID\n\u{fffd}[2Jx\u{fffd}\n");
    }

    #[test]
    fn sizes_and_spans_read_as_people_say_them() {
        let sizes = [(0, "0M"), (128, "128M"), (1024, "1G"), (1536, "1536M")];
        assert!(sizes.iter().all(|(mib, text)| memory(*mib) == *text));
        let spans = [
            (0, "0s"),
            (59, "59s"),
            (61, "1m 1s"),
            (3661, "1h 1m"),
            (90_000, "1d 1h"),
        ];
        assert!(spans.iter().all(|(seconds, text)| span(*seconds) == *text));
    }
}
