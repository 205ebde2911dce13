//! Flags, terminal, exit codes.
