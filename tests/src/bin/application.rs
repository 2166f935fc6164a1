//! An application for tests that kill it: begins a transaction that writes the given keys, says
//! `ready` with its id, and commits when it is told to go on.
//!
//! `application FOLDER KEY…`

use std::path::Path;

use troth_sdk::{Client, ClientConfig};

#[tokio::main]
async fn main() {
    let mut words = std::env::args().skip(1);
    let folder = words.next().expect("the folder of a cluster");
    let config = ClientConfig::load(Path::new(&folder).join("client.toml")).expect("a configuration");
    let client = Client::connect(config).await.expect("it connects");
    let tx = client.begin().await.expect("it begins");
    for key in words {
        tx.get(&key).await.expect("it reads");
        tx.put(&key, "after").expect("it is small");
    }
    println!("ready {}", tx.id());
    std::io::stdin().read_line(&mut String::new()).expect("told to go on");
    panic!("nobody lives to hear the answer: {:?}", tx.commit().await);
}
