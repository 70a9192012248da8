//! The laws as code: one module per section of the contract, each function named after its law.
//!
//! No check is gated by what a backend says it can do. Where a backend answers differently, the law
//! says what it must answer, and that is checked.

pub mod c;
pub mod d;
pub mod f;
pub mod l;
pub mod p;
pub mod q;
pub mod r;
pub mod s;
