//! Numbers with a binary unit: `512`, `64M`, `64MB` and `64MiB`, `2g`.

/// The number, and the power of two that its unit stands for, if it has a unit; `None` if the text is something else.
pub(crate) fn number(text: &str) -> Option<(u64, Option<u32>)> {
    let digits_bytes = text.bytes().take_while(u8::is_ascii_digit).count();
    let (digits, unit) = text.split_at(digits_bytes);
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" => None,
        "B" => Some(0),
        "K" | "KB" | "KIB" => Some(10),
        "M" | "MB" | "MIB" => Some(20),
        "G" | "GB" | "GIB" => Some(30),
        "T" | "TB" | "TIB" => Some(40),
        _ => return None,
    };
    Some((digits.parse().ok()?, shift))
}
