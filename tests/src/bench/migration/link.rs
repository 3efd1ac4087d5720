//! What a connection could do at best: the cipher alone, and TCP alone.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use ring::aead::{AES_128_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use crate::Outcome;

/// One record of TLS.
const RECORD_BYTES: usize = 16 << 10;
/// How much is written and read at a time.
const PIECE_BYTES: usize = 256 << 10;
const GIB: f64 = 1_073_741_824.0;

/// Bytes per second that AES-128-GCM seals, a record at a time.
///
/// # Errors
///
/// When the cipher is not there.
pub fn cipher_bytes_per_s(duration: Duration) -> Outcome<f64> {
    let key = UnboundKey::new(&AES_128_GCM, &[7; 16]).map_err(|_| "there is no AES-GCM")?;
    let key = LessSafeKey::new(key);
    let mut record = vec![1; RECORD_BYTES];
    let (begun, mut bytes, mut number) = (Instant::now(), 0.0, 0_u64);
    while begun.elapsed() < duration {
        let mut nonce = [0; NONCE_LEN];
        nonce
            .iter_mut()
            .zip(number.to_le_bytes())
            .for_each(|(to, from)| *to = from);
        let nonce = Nonce::assume_unique_for_key(nonce);
        let _tag = key
            .seal_in_place_separate_tag(nonce, Aad::empty(), &mut record)
            .map_err(|_| "AES-GCM refuses")?;
        number += 1;
        bytes += RECORD_BYTES as f64;
    }
    Ok(bytes / begun.elapsed().as_secs_f64())
}

/// Bytes per second that one connection carries on loopback, with nothing done to them.
///
/// # Errors
///
/// When there is no loopback.
pub fn loopback_bytes_per_s() -> Outcome<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let sending = std::thread::spawn(move || -> std::io::Result<()> {
        let mut socket = TcpStream::connect(address)?;
        let piece = vec![1; PIECE_BYTES];
        let mut left = GIB;
        while left > 0.0 {
            socket.write_all(&piece)?;
            left -= PIECE_BYTES as f64;
        }
        Ok(())
    });
    let (mut socket, _) = listener.accept()?;
    let (begun, mut piece, mut bytes) = (Instant::now(), vec![0; PIECE_BYTES], 0.0);
    loop {
        match socket.read(&mut piece)? {
            0 => break,
            len => bytes += len as f64,
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    sending.join().map_err(|_| "a thread has panicked")??;
    Ok(bytes / seconds)
}
