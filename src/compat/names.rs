//! How qemu shows the name of a file that an image names.

/// The name that an image gives, seen from the place of that image: absolute
/// names stay, relative ones start at its folder. Nothing is normalised.
pub fn combine(image: &str, named: &str) -> String {
    if named.starts_with('/') {
        return named.to_owned();
    }
    let folder = image.rfind('/').map_or("", |slash| &image[..=slash]);
    format!("{folder}{named}")
}

#[cfg(test)]
mod tests {
    use super::combine;

    #[test]
    fn relative_names_start_at_the_images_folder() {
        assert_eq!(combine("a.qcow2", "b.raw"), "b.raw");
        assert_eq!(combine("sub/s.qcow2", "../a.qcow2"), "sub/../a.qcow2");
        assert_eq!(combine("/abs/s.qcow2", "b.raw"), "/abs/b.raw");
        assert_eq!(combine("sub/s.qcow2", "/b.raw"), "/b.raw");
    }
}
