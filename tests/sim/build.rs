//! The simulation's clock and random numbers stand in for those of the C library. Code that looks the
//! functions up by name at run time finds them only if the program offers them to others.

fn main() {
    for name in ["clock_gettime", "getrandom"] {
        println!("cargo::rustc-link-arg-bins=-Wl,--export-dynamic-symbol={name}");
    }
}
