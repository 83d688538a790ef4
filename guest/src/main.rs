//! The program that runs in the sandbox.
#![no_std]
#![no_main]
